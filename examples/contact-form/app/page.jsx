"use client";
import { useState } from "react";
import { call } from "@/lib/call";

export default function Write() {
  const [state, setState] = useState({});

  async function send(event) {
    event.preventDefault();
    const form = event.currentTarget;
    setState({ busy: true });
    try {
      const { messageId } = await call("produce", Object.fromEntries(new FormData(form)));
      form.reset();
      setState({ messageId });
    } catch (error) {
      setState({ error: error.message });
    }
  }

  return (
    <section className="card">
      <h1>Write to us</h1>
      <form onSubmit={send}>
        <div className="pair">
          <label>
            Name
            <input name="name" autoComplete="name" required />
          </label>
          <label>
            Email
            <input name="email" type="email" autoComplete="email" required />
          </label>
        </div>
        <label>
          Message
          <textarea name="message" rows={6} required />
        </label>
        <button disabled={state.busy}>{state.busy ? "Sending…" : "Send"}</button>
      </form>
      {state.messageId && (
        <p className="good" role="status">
          Thank you. Your message is stored as <code>{state.messageId}</code>.
        </p>
      )}
      {state.error && <p className="bad" role="alert">Not sent: {state.error}. Please try again.</p>}
    </section>
  );
}
