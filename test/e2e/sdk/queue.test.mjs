// The unmodified @vercel/queue client against each node of a healthy cluster.
import assert from "node:assert/strict";
import { after, before, describe, test } from "node:test";
import { BadRequestError, InvalidLimitError, MessageNotAvailableError, MessageNotFoundError, TooManyRequestsError } from "@vercel/queue";
import { advance, binary, client, collect, gate, HandlerError, nodes, streaming } from "./cluster.mjs";

// The client warns of what it swallows; a test that expects it looks at the warnings, all others want none.
const warnings = [];
const { warn, error } = console;
before(() => {
  console.warn = (...args) => warnings.push(args.join(" "));
  console.error = (...args) => warnings.push(args.join(" "));
});
after(() => {
  console.warn = warn;
  console.error = error;
  assert.deepEqual(warnings, [], "the client complained");
});

async function bytesOf(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return Buffer.concat(chunks);
}

const pattern = (size) => Buffer.from(Array.from({ length: size }, (_, i) => (i * 31 + (i >> 8)) & 255));

nodes.forEach((node, index) => {
  // Sent through one node, received through the next: every pair of roles comes up.
  const other = nodes[(index + 1) % nodes.length];
  const topic = (name) => `sdk-${index}-${name}`;

  describe(`via the ${node.role} ${index}, received via the ${other.role}`, () => {
    test("JSON", async () => {
      const payload = { id: 7, text: "grüße 🚀\r\n--boundary", nested: [null, true, 1.5] };
      const start = Date.now();
      const { messageId } = await client(node).send(topic("json"), payload);
      assert.equal(typeof messageId, "string");
      const got = await collect(client(other), topic("json"), "g");
      assert.equal(got.length, 1);
      assert.deepEqual(got[0].payload, payload);
      const { metadata } = got[0];
      assert.equal(metadata.messageId, messageId);
      assert.equal(metadata.deliveryCount, 1);
      assert.equal(metadata.topicName, topic("json"));
      assert.equal(metadata.consumerGroup, "g");
      assert.equal(metadata.expiresAt - metadata.createdAt, 24 * 3600 * 1000);
      assert.ok(metadata.createdAt - start < 60 * 24 * 3600 * 1000, "created in the present, give or take the virtual clock");
      assert.deepEqual(await client(node).receive(topic("json"), "g", assert.fail), { ok: false, reason: "empty" });
      // Another group gets it as well.
      assert.equal((await collect(client(node), topic("json"), "other")).length, 1);
    });

    test("bytes", async () => {
      const bodies = [Buffer.alloc(0), Buffer.from("\r\n\r\n"), pattern(1000), pattern(700_000)];
      for (const body of bodies) await binary(node).send(topic("bytes"), body);
      const got = await collect(binary(other), topic("bytes"), "g");
      assert.equal(got.length, bodies.length);
      bodies.forEach((body, i) => assert.ok(body.equals(got[i].payload), `body ${i}, ${body.length} bytes`));
    });

    test("a stream, sent without a length", async () => {
      const body = pattern(300_000);
      const source = new ReadableStream({
        start(controller) {
          for (let i = 0; i < body.length; i += 65_536) controller.enqueue(body.subarray(i, i + 65_536));
          controller.close();
        },
      });
      await streaming(node).send(topic("stream"), source);
      let got;
      const result = await streaming(other).receive(topic("stream"), "g", async (stream) => {
        got = await bytesOf(stream);
      });
      assert.deepEqual(result, { ok: true });
      assert.ok(body.equals(got));
    });

    test("several messages at a time, more than one receive", async () => {
      const sent = Array.from({ length: 25 }, (_, i) => ({ i }));
      for (const payload of sent) await client(node).send(topic("several"), payload);
      const sizes = [];
      const got = [];
      for (let size = -1; size !== 0; ) {
        size = 0;
        await client(other).receive(
          topic("several"),
          "g",
          (payload) => {
            got.push(payload);
            size++;
          },
          { limit: 10 },
        );
        sizes.push(size);
      }
      assert.deepEqual(got, sent);
      assert.deepEqual(sizes, [10, 10, 5, 0]);
    });

    test("batch", async () => {
      const messages = Array.from({ length: 100 }, (_, i) => ({ payload: { i }, ...(i % 2 && { retentionSeconds: 3600 }) }));
      const results = await client(node).experimental_sendBatch(topic("batch"), messages);
      assert.equal(results.length, 100);
      assert.ok(results.every((r) => r.status === "sent" && r.messageId));
      assert.equal(new Set(results.map((r) => r.messageId)).size, 100);
      const got = await collect(client(other), topic("batch"), "g");
      assert.deepEqual(got.map((m) => m.payload), messages.map((m) => m.payload));
      assert.deepEqual(got.map((m) => m.metadata.messageId), results.map((r) => r.messageId));
      assert.equal(got[1].metadata.expiresAt - got[1].metadata.createdAt, 3600 * 1000);
    });

    test("a batch with a bad message", async () => {
      const results = await client(node).experimental_sendBatch(topic("batch-bad"), [
        { payload: 1 },
        { payload: 2, retentionSeconds: 59 },
        { payload: 3, idempotencyKey: "k".repeat(257) },
        { payload: 4 },
      ]);
      assert.deepEqual(results.map((r) => r.status), ["sent", "failed", "failed", "sent"]);
      for (const r of results.slice(1, 3)) {
        assert.equal(r.statusCode, 400);
        assert.equal(r.retryable, false);
        assert.ok(r.error.length > 0);
      }
      assert.deepEqual((await collect(client(other), topic("batch-bad"), "g")).map((m) => m.payload), [1, 4]);
    });

    test("a handler that fails, with no retry handler: the message stays leased until its time is over", async () => {
      await client(node).send(topic("fails"), "x");
      await assert.rejects(
        client(other).receive(topic("fails"), "g", () => Promise.reject(new HandlerError("no")), { visibilityTimeoutSeconds: 30 }),
        HandlerError,
      );
      assert.deepEqual(await client(node).receive(topic("fails"), "g", assert.fail), { ok: false, reason: "empty" });
      await advance(node, 31);
      const got = await collect(client(other), topic("fails"), "g");
      assert.deepEqual(got.map((m) => [m.payload, m.metadata.deliveryCount]), [["x", 2]]);
    });

    test("a handler that fails, tried again after some time", async () => {
      await client(node).send(topic("retry"), "x");
      let deliveries = [];
      const again = (handler) =>
        client(other).receive(topic("retry"), "g", handler, {
          retry: (error, metadata) => {
            assert.ok(error instanceof HandlerError);
            deliveries.push(metadata.deliveryCount);
            return { afterSeconds: 600 };
          },
        });
      const failing = () => Promise.reject(new HandlerError("not yet"));
      assert.deepEqual(await again(failing), { ok: true });
      assert.deepEqual(await again(failing), { ok: false, reason: "empty" });
      await advance(node, 590);
      assert.deepEqual(await again(failing), { ok: false, reason: "empty" });
      await advance(other, 11);
      assert.deepEqual(await again(failing), { ok: true });
      await advance(node, 601);
      let count;
      assert.deepEqual(await again((_, metadata) => void (count = metadata.deliveryCount)), { ok: true });
      assert.deepEqual(deliveries, [1, 2]);
      assert.equal(count, 3);
      await advance(node, 3600);
      assert.deepEqual(await again(assert.fail), { ok: false, reason: "empty" });
    });

    test("a poisoned message, acknowledged by the retry handler", async () => {
      await client(node).send(topic("poison"), "x");
      const result = await client(other).receive(topic("poison"), "g", () => Promise.reject(new HandlerError("never")), {
        retry: () => ({ acknowledge: true }),
      });
      assert.deepEqual(result, { ok: true });
      await advance(node, 3600);
      assert.deepEqual(await client(node).receive(topic("poison"), "g", assert.fail), { ok: false, reason: "empty" });
    });

    test("a handler that outlives its lease cannot acknowledge, the next one can", async () => {
      await client(node).send(topic("late"), "x");
      const late = client(node).receive(
        topic("late"),
        "g",
        async () => {
          await advance(node, 31);
          const got = await collect(client(other), topic("late"), "g");
          assert.deepEqual(got.map((m) => m.metadata.deliveryCount), [2]);
        },
        { visibilityTimeoutSeconds: 30 },
      );
      await assert.rejects(late, (e) => e instanceof MessageNotAvailableError || e instanceof MessageNotFoundError);
    });

    test("by id: available, taken, done, unknown", async () => {
      const { messageId } = await client(node).send(topic("id"), { n: 1 });
      const inside = gate();
      const finish = gate();
      let payload;
      const holding = client(other).receive(
        topic("id"),
        "g",
        async (p) => {
          payload = p;
          inside.open();
          await finish.opened;
        },
        { messageId },
      );
      await inside.opened;
      assert.deepEqual(payload, { n: 1 });
      assert.deepEqual(await client(node).receive(topic("id"), "g", assert.fail, { messageId }), {
        ok: false,
        reason: "not_available",
        messageId,
      });
      // Another group may have it at the same time.
      assert.deepEqual(await client(node).receive(topic("id"), "h", () => {}, { messageId }), { ok: true });
      finish.open();
      assert.deepEqual(await holding, { ok: true });
      assert.deepEqual(await client(node).receive(topic("id"), "g", assert.fail, { messageId }), {
        ok: false,
        reason: "already_processed",
        messageId,
      });
      const elsewhere = await client(node).receive(topic("id-elsewhere"), "g", assert.fail, { messageId });
      assert.equal(elsewhere.reason, "not_found");
    });

    test("a key: stored once, and the duplicate's own id leads nowhere else", async () => {
      const first = await client(node).send(topic("key"), "x", { idempotencyKey: "k" });
      const second = await client(other).send(topic("key"), "y", { idempotencyKey: "k" });
      assert.notEqual(first.messageId, second.messageId);
      const duplicate = await client(other).receive(topic("key"), "g", assert.fail, { messageId: second.messageId });
      assert.equal(duplicate.reason, "not_available");
      const response = await fetch(new URL(`/api/v3/topic/${topic("key")}/consumer/g/id/${second.messageId}`, node.url), {
        method: "POST",
        headers: { Accept: "multipart/mixed" },
      });
      assert.equal(response.status, 409);
      assert.equal((await response.json()).originalMessageId, first.messageId);
      assert.deepEqual((await collect(client(other), topic("key"), "g")).map((m) => m.payload), ["x"]);
      // The key is known as long as the original lives, acknowledged or not, and not longer.
      await advance(node, 24 * 3600 + 1);
      await client(other).send(topic("key"), "z", { idempotencyKey: "k" });
      assert.deepEqual((await collect(client(node), topic("key"), "g")).map((m) => m.payload), ["z"]);
    });

    test("a delay of days", async () => {
      await client(node).send(topic("delay"), "later", { delaySeconds: 3 * 86400, retentionSeconds: 7 * 86400 });
      await client(node).send(topic("delay"), "now");
      assert.deepEqual((await collect(client(other), topic("delay"), "g")).map((m) => m.payload), ["now"]);
      await advance(node, 3 * 86400 - 600);
      assert.equal((await client(other).receive(topic("delay"), "g", assert.fail)).reason, "empty");
      await advance(node, 601);
      let got = [];
      while (got.length === 0) got = await collect(client(other), topic("delay"), "g"); // it is due, and takes its place with the next entry
      assert.deepEqual(got.map((m) => m.payload), ["later"]);
    });

    test("deployments", async () => {
      await client(node, { deploymentId: "dpl_a" }).send(topic("deployments"), "a");
      await client(node, { deploymentId: "dpl_b" }).send(topic("deployments"), "b");
      await client(node).send(topic("deployments"), "none");
      const of = async (deploymentId) => (await collect(client(other, { deploymentId }), topic("deployments"), "g")).map((m) => m.payload);
      assert.deepEqual(await of("dpl_b"), ["b"]);
      assert.deepEqual(await of("dpl_b"), []);
      assert.deepEqual(await of(null), ["a", "none"]);
    });

    test("a group that starts at the end", async () => {
      await client(node).send(topic("cursor"), "before");
      const latest = { cursorFallback: "latest" };
      assert.equal((await client(other).receive(topic("cursor"), "g", assert.fail, latest)).reason, "empty");
      await client(node).send(topic("cursor"), "behind");
      assert.deepEqual((await collect(client(other), topic("cursor"), "g", latest)).map((m) => m.payload), ["behind"]);
      assert.deepEqual((await collect(client(other), topic("cursor"), "h")).map((m) => m.payload), ["before", "behind"]);
    });

    test("an expired message", async () => {
      const { messageId } = await client(node).send(topic("expired"), "x", { retentionSeconds: 60 });
      await advance(node, 61);
      assert.deepEqual(await client(other).receive(topic("expired"), "g", assert.fail), { ok: false, reason: "empty" });
      assert.equal((await client(other).receive(topic("expired"), "g", assert.fail, { messageId })).reason, "not_found");
    });

    test("a look without a lease leaves everything as it was", async () => {
      // The client never asks for less than 30 s; others on the same topic may look.
      await client(node).send(topic("peek"), "x");
      for (let i = 0; i < 2; i++) {
        const response = await fetch(new URL(`/api/v3/topic/${topic("peek")}/consumer/g`, node.url), {
          method: "POST",
          headers: { Accept: "application/x-ndjson", "Vqs-Visibility-Timeout-Seconds": "0" },
        });
        assert.equal(response.status, 200);
        assert.equal(JSON.parse(await response.text()).deliveryCount, 1);
      }
      const got = await collect(client(other), topic("peek"), "g");
      assert.deepEqual(got.map((m) => m.metadata.deliveryCount), [1]);
    });

    test("a message that travels in parts", async () => {
      const bytes = Buffer.alloc((3 << 20) + 7, "parts of it");
      await binary(node).send(topic("large"), bytes);
      const got = await collect(binary(other), topic("large"), "g");
      assert.equal(got.length, 1);
      assert.ok(Buffer.from(got[0].payload).equals(bytes));
    });

    test("errors have the client's own types", async () => {
      const queue = client(node);
      await assert.rejects(queue.send("not a name", 1), BadRequestError);
      await assert.rejects(queue.send(topic("e"), 1, { retentionSeconds: 59 }), BadRequestError);
      await assert.rejects(queue.send(topic("e"), 1, { delaySeconds: -1 }), BadRequestError);
      await assert.rejects(queue.send(topic("e"), 1, { idempotencyKey: "k".repeat(257) }), BadRequestError);
      await assert.rejects(queue.receive("not a name", "g", assert.fail), BadRequestError);
      await assert.rejects(queue.receive(topic("e"), "not a name", assert.fail), BadRequestError);
      await assert.rejects(queue.receive(topic("e"), "g", assert.fail, { limit: 11 }), InvalidLimitError);
      await assert.rejects(queue.receive(topic("e"), "g", assert.fail, { visibilityTimeoutSeconds: 3601 }), BadRequestError);
      // Nothing of all this was stored.
      assert.deepEqual(await queue.receive(topic("e"), "g", assert.fail), { ok: false, reason: "empty" });
    });

    test("no more at a time than the group allows", async () => {
      const queue = client(node, { headers: { "Vqs-Max-Concurrency": "1" } });
      await client(node).send(topic("concurrency"), 1);
      await client(node).send(topic("concurrency"), 2);
      const result = await queue.receive(topic("concurrency"), "g", async () => {
        await assert.rejects(queue.receive(topic("concurrency"), "g", assert.fail), (e) => {
          assert.ok(e instanceof TooManyRequestsError, e.constructor.name);
          return true;
        });
      });
      assert.deepEqual(result, { ok: true });
      assert.deepEqual((await collect(queue, topic("concurrency"), "g")).map((m) => m.payload), [2]);
    });
  });
});

test("long handlers: their leases are extended behind their backs", async () => {
  // The client extends a lease of 30 s every 10 s of real time. All nodes at once, since they share the clock.
  const topic = (index) => `sdk-${index}-long`;
  const other = (index) => nodes[(index + 1) % nodes.length];
  const inside = nodes.map(() => gate());
  const finish = gate();
  for (const index of nodes.keys()) await client(other(index)).send(topic(index), "x");
  const handlers = nodes.map((node, index) =>
    client(node).receive(
      topic(index),
      "g",
      async () => {
        inside[index].open();
        await finish.opened;
      },
      { visibilityTimeoutSeconds: 30 },
    ),
  );
  await Promise.all(inside.map((g) => g.opened));
  await advance(nodes[0], 15); // half of the lease, so that only the extension can bridge what follows
  await new Promise((resolve) => setTimeout(resolve, 10_500));
  await advance(nodes[0], 20); // 45 s after the receive, and 20 s after the extension
  for (const index of nodes.keys()) {
    assert.deepEqual(await client(other(index)).receive(topic(index), "g", assert.fail), { ok: false, reason: "empty" });
  }
  finish.open();
  assert.deepEqual(await Promise.all(handlers), nodes.map(() => ({ ok: true })));
  await advance(nodes[0], 3600);
  for (const index of nodes.keys()) {
    assert.deepEqual(await client(other(index)).receive(topic(index), "g", assert.fail), { ok: false, reason: "empty" });
  }
});

test("many clients at once: each message once", async () => {
  const count = 300;
  const sends = [];
  for (let i = 0; i < count; i++) sends.push(client(nodes[i % nodes.length]).send("sdk-many", { i }));
  const ids = (await Promise.all(sends)).map((r) => r.messageId);
  assert.equal(new Set(ids).size, count);
  const got = (await Promise.all(nodes.flatMap((n) => [collect(client(n), "sdk-many", "g"), collect(client(n), "sdk-many", "g")]))).flat();
  // A receive that finds everything leased comes back empty; what is left then is nothing.
  got.push(...(await collect(client(nodes[0]), "sdk-many", "g")));
  assert.equal(got.length, count);
  assert.deepEqual(new Set(got.map((m) => m.metadata.messageId)), new Set(ids));
  assert.ok(got.every((m) => m.metadata.deliveryCount === 1));
});
