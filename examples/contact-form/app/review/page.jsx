"use client";
import Link from "next/link";
import { useCallback, useEffect, useState } from "react";
import { call } from "@/lib/call";

export default function Review() {
  const [consumer, setConsumer] = useState("");
  const [state, setState] = useState({ busy: true });

  const load = useCallback(async (who) => {
    setState({ busy: true });
    try {
      setState(await call(`consume?consumer=${encodeURIComponent(who)}`));
    } catch (error) {
      setState({ error: error.message });
    }
  }, []);

  useEffect(() => {
    const who = new URLSearchParams(location.search).get("consumer") || "default";
    setConsumer(who);
    load(who);
  }, [load]);

  function change(event) {
    event.preventDefault();
    const who = new FormData(event.currentTarget).get("consumer").trim() || "default";
    history.replaceState(null, "", `?consumer=${encodeURIComponent(who)}`);
    setConsumer(who);
    load(who);
  }

  async function done() {
    try {
      await call("acknowledge", { messageId: state.message.messageId });
      await load(consumer);
    } catch (error) {
      setState({ ...state, error: error.message });
    }
  }

  const { message } = state;
  return (
    <section className="card">
      <h1>Review</h1>
      <form className="line" onSubmit={change} key={consumer}>
        <label>
          Reviewer
          <input name="consumer" defaultValue={consumer} />
        </label>
        <button className="plain">Show mine</button>
      </form>
      {message && (
        <article aria-label="Message">
          <header>
            <span>
              <b>{message.name}</b> <a href={`mailto:${message.email}`}>{message.email}</a>
            </span>
            <time dateTime={message.timestamp}>{message.timestamp.replace("T", " ").slice(0, 19)} UTC</time>
          </header>
          <p>{message.message}</p>
          <footer>
            <Link href={`/acknowledge?id=${message.messageId}`}>
              <code>{message.messageId}</code>
            </Link>
            <span>{message.deliveryCount === 1 ? "first delivery" : `delivery ${message.deliveryCount}`}</span>
            <button onClick={done}>Acknowledge</button>
          </footer>
        </article>
      )}
      {state.message === null && <p className="empty" role="status">Nothing to review.</p>}
      {state.busy && <p className="empty">Looking…</p>}
      {state.error && <p className="bad" role="alert">{state.error}</p>}
    </section>
  );
}
