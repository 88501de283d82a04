// Messages and batches of many megabytes, through the unmodified client.
import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { test } from "node:test";
import { binary, collect, nodes, streaming } from "./cluster.mjs";

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

// Not with the oldest release: its fetch lacks the option without which Node.js sends no stream, and its parser gives up on
// long bodies when the network cuts them in the wrong place.
test("a stream of 100 MiB", async () => {
  const sent = source(100 << 20);
  await streaming(node).send("sdk-huge", sent.stream);
  const hash = createHash("sha256");
  let bytes = 0;
  const result = await streaming(other).receive("sdk-huge", "g", async (stream) => {
    for await (const chunk of stream) {
      hash.update(chunk);
      bytes += chunk.length;
    }
  });
  assert.deepEqual(result, { ok: true });
  assert.equal(bytes, 100 << 20);
  assert.equal(hash.digest("hex"), sent.hash.digest("hex"));
  assert.deepEqual(await streaming(other).receive("sdk-huge", "g", assert.fail), { ok: false, reason: "empty" });
});

test("a batch that does not fit in memory", async () => {
  const sizes = [10, 2_500_000, 900_000, 900_000, 0, 1_500_000];
  const bodies = sizes.map((n, i) => Buffer.alloc(n, `${i}.`));
  const results = await binary(node).experimental_sendBatch("sdk-large-batch", bodies.map((payload, i) => ({ payload, idempotencyKey: `k${i}` })));
  assert.deepEqual(results.map((r) => r.status), bodies.map(() => "sent"));
  const got = await collect(binary(other), "sdk-large-batch", "g");
  assert.deepEqual(got.map((m) => m.metadata.messageId), results.map((r) => r.messageId));
  bodies.forEach((body, i) => assert.ok(body.equals(got[i].payload), `body ${i}`));
});
