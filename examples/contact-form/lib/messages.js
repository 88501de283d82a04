// The contact messages: one stream, one consumer group, and a consumer for each reviewer.
import { GlideClient } from "@valkey/valkey-glide";

const stream = "contact-messages";
const group = "contact-processors";
// Acknowledged messages stay in the stream; of all messages, about this many are kept.
const keep = 10000;
// A message that a reviewer has held for this long may be given to another one.
const timeout = Number(process.env.REVIEW_TIMEOUT_MS ?? 60000);

// One connection serves all requests: glide sends them as a pipeline, and reconnects by itself. In development Next.js
// loads this module again after each change, so the connection lives outside of it.
function client() {
  globalThis.contactClient ??= connect().catch((error) => {
    globalThis.contactClient = undefined; // the next request tries again
    throw error;
  });
  return globalThis.contactClient;
}

async function connect() {
  const endpoint = process.env.VALKEY_ENDPOINT ?? "localhost:6379";
  const colon = endpoint.lastIndexOf(":");
  return GlideClient.createClient({
    addresses: [{ host: endpoint.slice(0, colon), port: Number(endpoint.slice(colon + 1)) }],
    requestTimeout: 5000,
    clientName: "contact-form",
  });
}

const object = (pairs) => Object.fromEntries(pairs.map(([field, value]) => [String(field), String(value)]));

const delivery = (id, pairs, deliveryCount) => {
  const { name, email, message, timestamp } = object(pairs);
  return { messageId: id, name, email, message, timestamp, deliveryCount };
};

/** Appends a message. When this returns, it is on the disk of every zone. */
export async function produce({ name, email, message }) {
  const timestamp = new Date().toISOString();
  const fields = Object.entries({ name, email, message, timestamp });
  const messageId = await (await client()).xadd(stream, fields, { trim: { method: "maxlen", threshold: keep, exact: false } });
  return { messageId: String(messageId), timestamp };
}

/** Returns what the consumer has to review: what it holds already, else what others have held for too long, else a new message, else null. */
export async function consume(consumer) {
  const c = await client();
  try {
    return await next(c, consumer);
  } catch (error) {
    if (!String(error).includes("NOGROUP")) throw error;
  }
  // The first request of all, or somebody deleted the stream.
  await c.xgroupCreate(stream, group, "0", { mkStream: true }).catch((error) => {
    if (!String(error).includes("BUSYGROUP")) throw error; // another process was faster
  });
  return next(c, consumer);
}

async function next(c, consumer) {
  // Looking at one's own pending entries leaves them as they are; reading them by XREADGROUP would count as a delivery.
  for (;;) {
    const [own] = await c.xpendingWithOptions(stream, group, {
      start: { value: "-" }, end: { value: "+" }, count: 1, consumer,
    }).then(rows);
    if (!own) break;
    if (own.idle >= timeout) {
      // Claimed only if it is still as old as that: nobody else has it by now.
      for (const [id, pairs] of Object.entries(await c.xclaim(stream, group, consumer, timeout, [own.id]))) {
        return delivery(id, pairs, own.count + 1);
      }
      continue;
    }
    for (const [id, pairs] of Object.entries((await c.xrange(stream, { value: own.id }, { value: own.id })) ?? {})) {
      return delivery(id, pairs, own.count);
    }
    await c.xack(stream, group, [own.id]); // trimmed or deleted since: there is nothing to review
  }
  const [, claimed] = await c.xautoclaim(stream, group, consumer, timeout, "0-0", { count: 1 });
  for (const [id, pairs] of Object.entries(claimed)) {
    const [row] = await c.xpendingWithOptions(stream, group, { start: { value: id }, end: { value: id }, count: 1 }).then(rows);
    return delivery(id, pairs, row?.count ?? 2);
  }
  const read = await c.xreadgroup(group, consumer, { [stream]: ">" }, { count: 1 });
  for (const { value } of read ?? []) {
    for (const [id, pairs] of Object.entries(value)) return delivery(id, pairs, 1);
  }
  return null;
}

const rows = (list) => list.map(([id, , idle, count]) => ({ id: String(id), idle: Number(idle), count: Number(count) }));

/** Ends a message; returns 1, or 0 when it was not pending. */
export async function acknowledge(messageId) {
  if (!/^\d{1,20}(-\d{1,20})?$/.test(messageId)) return 0;
  return Number(await (await client()).xack(stream, group, [messageId]));
}

/** Answers a request, or says that the queue does not answer. */
export async function answer(work) {
  try {
    return await work();
  } catch (error) {
    console.error(error);
    return Response.json({ error: "the queue does not answer" }, { status: 503, headers: { "Retry-After": "1" } });
  }
}

/** Returns the body as an object of its non-empty strings. */
export async function strings(request) {
  const body = await request.json().catch(() => null);
  if (typeof body !== "object" || body === null) return {};
  return Object.fromEntries(Object.entries(body).filter(([, value]) => typeof value === "string" && value.trim() !== ""));
}
