// The unmodified @vercel/queue client against `tercet gateway` in front of a real redis-server.
import assert from "node:assert/strict";
import { test } from "node:test";
import { clientOf, collect, gate, HandlerError, nodes } from "./cluster.mjs";

// TERCET_SDK names the version of the client.
const sdk = await import(process.env.TERCET_SDK ?? "@vercel/queue");
const { MessageNotFoundError } = sdk;
const client = (node, options) => clientOf(sdk, node, options);
const binary = (node) => client(node, { transport: new sdk.BufferTransport() });
const streaming = (node) => client(node, { transport: new sdk.StreamTransport() });
const node = nodes[0];
const other = nodes.at(-1); // another gateway on the same upstream
const queue = client(node);
let next = 0;
const topic = () => `gateway-${process.pid}-${next++}`;

// The client extends a lease of 30 s every 10 s. This handler outlives its lease; the last test looks at what became of it.
const long = topic();
await queue.send(long, "x");
const inside = gate();
const finish = gate();
const began = Date.now();
const outliving = queue.receive(long, "g", async () => {
  inside.open();
  await finish.opened;
}, { visibilityTimeoutSeconds: 30 });
await inside.opened;

test("send, receive, acknowledge", async () => {
  const t = topic();
  const { messageId } = await queue.send(t, { order: 1 });
  const got = await collect(queue, t, "g");
  assert.equal(got.length, 1);
  assert.deepEqual(got[0].payload, { order: 1 });
  assert.equal(got[0].metadata.messageId, messageId);
  assert.equal(got[0].metadata.deliveryCount, 1);
  assert.equal(got[0].metadata.topicName, t);
  assert.deepEqual(await collect(queue, t, "g"), []);
  assert.equal((await collect(queue, t, "other")).length, 1, "each group has every message");
});

test("a hundred messages, ten at a time", async () => {
  const t = topic();
  await Promise.all(Array.from({ length: 100 }, (_, i) => queue.send(t, i)));
  const got = await collect(queue, t, "g");
  assert.deepEqual(got.map((m) => m.payload).sort((a, b) => a - b), Array.from({ length: 100 }, (_, i) => i));
});

test("bytes as they are", async () => {
  const t = topic();
  const bytes = Buffer.from(Array.from({ length: 300_000 }, (_, i) => (i * 7) % 256));
  await binary(node).send(t, bytes);
  const got = await collect(binary(node), t, "g");
  assert.ok(Buffer.from(got[0].payload).equals(bytes));
});

test("a handler that fails gets the message again", async () => {
  const t = topic();
  await queue.send(t, "x");
  const counts = [];
  for (let i = 0; i < 2; i++) {
    await queue.receive(t, "g", async () => {
      counts.push(i);
      throw new HandlerError("no");
    }, { retry: () => ({ afterSeconds: 0 }) }).catch(() => {});
  }
  assert.deepEqual(counts, [0, 1]);
  const got = await collect(queue, t, "g");
  assert.equal(got[0].metadata.deliveryCount, 3);
});

test("retry later", async () => {
  const t = topic();
  await queue.send(t, "x");
  await queue.receive(t, "g", async () => { throw new HandlerError("no"); }, { retry: () => ({ afterSeconds: 1 }) }).catch(() => {});
  assert.equal((await queue.receive(t, "g", async () => {})).reason, "empty");
  for (;;) {
    const got = await collect(queue, t, "g");
    if (got.length > 0) {
      assert.equal(got[0].metadata.deliveryCount, 2);
      return;
    }
  }
});

test("by ID: not there, leased, processed, duplicate", async () => {
  const t = topic();
  const first = await queue.send(t, "x", { idempotencyKey: "k" });
  const second = await queue.send(t, "y", { idempotencyKey: "k" });
  assert.notEqual(first.messageId, second.messageId);
  const inside = gate();
  const leave = gate();
  const busy = queue.receive(t, "g", async () => {
    inside.open();
    await leave.opened;
  }, { messageId: first.messageId });
  await inside.opened;
  const other = await queue.receive(t, "g", async () => assert.fail("leased"), { messageId: first.messageId });
  assert.deepEqual([other.ok, other.reason], [false, "not_available"]);
  leave.open();
  assert.equal((await busy).ok, true);
  const again = await queue.receive(t, "g", async () => assert.fail("processed"), { messageId: first.messageId });
  assert.equal(again.reason, "already_processed");
  const duplicate = await queue.receive(t, "g", async () => assert.fail("duplicate"), { messageId: second.messageId });
  assert.equal(duplicate.reason, "not_available");
  const nothing = await queue.receive(t, "g", async () => assert.fail("nothing"), { messageId: "abc" }).catch((e) => e);
  assert.ok(nothing instanceof MessageNotFoundError || nothing.reason === "not_found", String(nothing));
});

test("delay", async () => {
  const t = topic();
  const sent = Date.now();
  await queue.send(t, "x", { delaySeconds: 1 });
  assert.equal((await queue.receive(t, "g", async () => {})).reason, "empty");
  let got = [];
  while (got.length === 0) got = await collect(queue, t, "g");
  assert.ok(Date.now() - sent >= 1000, "a delayed message was early");
});

test("deployments", async () => {
  const t = topic();
  await client(node, { deploymentId: "dpl_a" }).send(t, "a");
  await client(node, { deploymentId: "dpl_b" }).send(t, "b");
  assert.deepEqual((await collect(client(node, { deploymentId: "dpl_b" }), t, "g")).map((m) => m.payload), ["b"]);
  assert.deepEqual((await collect(queue, t, "g")).map((m) => m.payload), ["a"]);
});

test("an idempotency key: stored once", async () => {
  const t = topic();
  for (const n of [node, other, node]) await client(n).send(t, { n: 1 }, { idempotencyKey: "same" });
  await queue.send(t, { n: 2 }, { idempotencyKey: "another" });
  const got = await collect(client(other), t, "g");
  assert.deepEqual(got.map((m) => m.payload.n).sort(), [1, 2]);
  await queue.send(t, { n: 1 }, { idempotencyKey: "same" });
  assert.deepEqual(await collect(queue, t, "g"), [], "acknowledged is not gone: the key still holds");
});

test("two gateways, many clients: each message once", async () => {
  const t = topic();
  const count = 200;
  await Promise.all(Array.from({ length: count }, (_, i) => client(i % 2 ? node : other).send(t, i)));
  const got = (await Promise.all([node, other, node, other].map((n) => collect(client(n), t, "g")))).flat();
  got.push(...(await collect(queue, t, "g")));
  assert.deepEqual(got.map((m) => m.payload).sort((a, b) => a - b), Array.from({ length: count }, (_, i) => i));
  assert.ok(got.every((m) => m.metadata.deliveryCount === 1));
});

// The oldest client has no batches, and cannot send streams from Node.js.
const newest = Boolean(queue.experimental_sendBatch);
if (newest) test("a stream of bytes", async () => {
  const t = topic();
  const parts = ["one ", "two ", "three"];
  await streaming(node).send(t, new ReadableStream({
    start(controller) {
      for (const p of parts) controller.enqueue(new TextEncoder().encode(p));
      controller.close();
    },
  }));
  let text;
  await streaming(other).receive(t, "g", async (stream) => void (text = await new Response(stream).text()));
  assert.equal(text, parts.join(""));
});

test("a retry acknowledged instead", async () => {
  const t = topic();
  await queue.send(t, "x");
  await queue.receive(t, "g", async () => { throw new HandlerError("no"); }, { retry: () => ({ acknowledge: true }) }).catch(() => {});
  assert.deepEqual(await collect(client(other), t, "g"), []);
});

test("an empty topic", async () => {
  assert.deepEqual(await queue.receive(topic(), "g", assert.fail), { ok: false, reason: "empty" });
});

if (newest) test("batches", async () => {
  const t = topic();
  const results = await queue.experimental_sendBatch(t, Array.from({ length: 100 }, (_, i) => ({ payload: { i }, idempotencyKey: `k${i}` })));
  assert.equal(results.length ?? results.results.length, 100);
  const got = await collect(queue, t, "g");
  assert.equal(got.length, 100);
});

test("long handlers: their leases are extended behind their backs", async () => {
  await new Promise((resolve) => setTimeout(resolve, Math.max(0, 33_000 - (Date.now() - began))));
  assert.deepEqual(await client(other).receive(long, "g", assert.fail), { ok: false, reason: "empty" });
  finish.open();
  assert.deepEqual(await outliving, { ok: true });
  assert.deepEqual(await queue.receive(long, "g", assert.fail), { ok: false, reason: "empty" });
});
