"use client";
import { useEffect, useRef, useState } from "react";
import { call } from "@/lib/call";

export default function Acknowledge() {
  const [state, setState] = useState({});
  const field = useRef(null);

  useEffect(() => {
    field.current.value = new URLSearchParams(location.search).get("id") ?? "";
  }, []);

  async function send(event) {
    event.preventDefault();
    const messageId = field.current.value.trim();
    setState({ busy: true });
    try {
      setState({ messageId, ...(await call("acknowledge", { messageId })) });
    } catch (error) {
      setState({ error: error.message });
    }
  }

  return (
    <section className="card">
      <h1>Acknowledge by ID</h1>
      <p>What was acknowledged is given to no reviewer again.</p>
      <form className="line" onSubmit={send}>
        <label>
          Message ID
          <input ref={field} name="messageId" placeholder="1795339200000-0" required spellCheck={false} />
        </label>
        <button disabled={state.busy}>Acknowledge</button>
      </form>
      {state.acknowledged === 1 && <p className="good" role="status"><code>{state.messageId}</code> is acknowledged.</p>}
      {state.acknowledged === 0 && <p className="empty" role="status"><code>{state.messageId}</code> was with no reviewer: unknown, or acknowledged before.</p>}
      {state.error && <p className="bad" role="alert">{state.error}</p>}
    </section>
  );
}
