// Messages and batches of many megabytes, with the newest client and the oldest.
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { test } from "node:test";
import * as newest from "@vercel/queue";
import * as oldest from "queue-oldest";
import { binary, clientOf, collect, nodes } from "./cluster.mjs";

const node = nodes[0];
const other = nodes[nodes.length - 1];

// source is a stream of so many bytes that never are in memory together, and their hash.
function source(bytes) {
  const hash = createHash("sha256");
  let made = 0;
  const stream = new ReadableStream({
    pull(controller) {
      if (made === bytes) return controller.close();
      const chunk = Buffer.alloc(Math.min(1 << 16, bytes - made), `${made}.`);
      made += chunk.length;
      hash.update(chunk);
      controller.enqueue(chunk);
    },
  });
  return { stream, hash };
}

async function bytesOf(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return Buffer.concat(chunks);
}

for (const [release, sdk] of Object.entries({ newest, oldest })) {
  test(`a stream of 100 MiB, ${release} release`, async () => {
    const streaming = (n) => clientOf(sdk, n, { transport: new sdk.StreamTransport() });
    const topic = `sdk-huge-${release}`;
    const sent = source(100 << 20);
    // The oldest release cannot send a stream: its fetch lacks an option that Node.js insists on.
    if (sdk === newest) await streaming(node).send(topic, sent.stream);
    else await clientOf(sdk, node, { transport: new sdk.BufferTransport() }).send(topic, await bytesOf(sent.stream));
    const hash = createHash("sha256");
    let bytes = 0;
    const result = await streaming(other).receive(topic, "g", async (stream) => {
      for await (const chunk of stream) {
        hash.update(chunk);
        bytes += chunk.length;
      }
    });
    assert.deepEqual(result, { ok: true });
    assert.equal(bytes, 100 << 20);
    assert.equal(hash.digest("hex"), sent.hash.digest("hex"));
    assert.deepEqual(await streaming(other).receive(topic, "g", assert.fail), { ok: false, reason: "empty" });
  });
}

test("a batch that does not fit in memory", async () => {
  const sizes = [10, 2_500_000, 900_000, 900_000, 0, 1_500_000];
  const bodies = sizes.map((n, i) => Buffer.alloc(n, `${i}.`));
  const results = await binary(node).experimental_sendBatch("sdk-large-batch", bodies.map((payload, i) => ({ payload, idempotencyKey: `k${i}` })));
  assert.deepEqual(results.map((r) => r.status), bodies.map(() => "sent"));
  const got = await collect(binary(other), "sdk-large-batch", "g");
  assert.deepEqual(got.map((m) => m.metadata.messageId), results.map((r) => r.messageId));
  bodies.forEach((body, i) => assert.ok(body.equals(got[i].payload), `body ${i}`));
});
