// What the tests share: where the cluster is, clients of it, and its clock.
import * as newest from "@vercel/queue";

const { BufferTransport, StreamTransport } = newest;

const roles = (process.env.TERCET_NODES ?? "").split(",").filter(Boolean);
if (roles.length === 0) {
  throw new Error("TERCET_NODES is not set: run these tests through `go test ./test/e2e -run TestSDK`");
}

// nodes are the nodes to talk to, each with its role and base URL. The first one leads.
export const nodes = roles.map((entry) => {
  const [role, url] = entry.split("=");
  return { role, url };
});

// client makes an unmodified client of one node.
export const client = (node, options) => clientOf(newest, node, options);

// clientOf does so with another release of the package.
export function clientOf(sdk, node, options = {}) {
  return new sdk.PollingQueueClient({
    region: "iad1",
    resolveBaseUrl: () => new URL(node.url),
    token: "any",
    deploymentId: null,
    ...options,
  });
}

export const binary = (node) => client(node, { transport: new BufferTransport() });
export const streaming = (node) => client(node, { transport: new StreamTransport() });

// advance moves the clock of the whole cluster, which runs with --virtual-clock.
export async function advance(node, seconds) {
  const response = await fetch(new URL("/v1/clock/advance", node.url), {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ seconds }),
  });
  const text = await response.text();
  if (!response.ok) throw new Error(`advance the clock: ${response.status} ${text}`);
}

// collect receives until nothing is left and returns what the handler got.
export async function collect(queue, topic, group, options = {}) {
  const got = [];
  for (;;) {
    const result = await queue.receive(topic, group, async (payload, metadata) => void got.push({ payload, metadata }), {
      limit: 10,
      ...options,
    });
    if (!result.ok) {
      if (result.reason !== "empty") throw new Error(`receive: ${result.reason}`);
      return got;
    }
  }
}

// A gate is a promise that somebody else resolves.
export function gate() {
  let open;
  const opened = new Promise((resolve) => (open = resolve));
  return { open, opened };
}

export class HandlerError extends Error {}
