// What the unmodified client makes of a cluster that cannot serve it. TERCET_STATE says what is wrong.
//
// The client takes 503, and in older releases 502, of a send for a missing configuration of the project. It must
// never get to see them.
import assert from "node:assert/strict";
import { describe, test } from "node:test";
import { InternalServerError, TooManyRequestsError } from "@vercel/queue";
import { client, nodes } from "./cluster.mjs";

// understood checks that the client understood a refusal, or an unknown outcome, as what it is, and returns the body.
function understood(e, ...types) {
  assert.ok(types.some((type) => e.constructor === type), `${e.constructor.name}: ${e.message}`);
  const body = JSON.parse(e.message);
  assert.equal(body.outcome, e instanceof TooManyRequestsError ? "none" : "unknown");
  return body;
}

const states = {
  "zone away"(node, name) {
    const all = client(node, { headers: { "Tercet-Durability": "all" } });
    const refused = (e) => {
      assert.equal(understood(e, TooManyRequestsError).code, "zones_unavailable");
      return true;
    };
    test(`a send to all zones is refused, via ${name}`, async () => {
      await assert.rejects(all.send("sdk-refused", 1), refused);
    });
    test(`a batch to all zones is refused, via ${name}`, async () => {
      await assert.rejects(all.experimental_sendBatch("sdk-refused", [{ payload: 1 }]), refused);
    });
    test(`an ordinary send succeeds, via ${name}`, async () => {
      const { messageId } = await client(node).send("sdk-degraded", 1);
      assert.ok(messageId);
    });
    test(`nothing that was refused is stored, via ${name}`, async () => {
      assert.deepEqual(await client(node).receive("sdk-refused", "g", assert.fail), { ok: false, reason: "empty" });
    });
  },
  "no majority"(node, name) {
    const failed = (e) => Boolean(understood(e, TooManyRequestsError, InternalServerError));
    test(`a send fails as refused or as unknown, via ${name}`, async () => {
      await assert.rejects(client(node).send("sdk-nobody", 1), failed);
    });
    test(`so does a batch, via ${name}`, async () => {
      await assert.rejects(client(node).experimental_sendBatch("sdk-nobody", [{ payload: 1 }]), failed);
    });
    test(`a receive fails as unavailable, via ${name}`, async () => {
      await assert.rejects(client(node).receive("sdk-nobody", "g", assert.fail), (e) => {
        assert.ok(e instanceof TooManyRequestsError || e instanceof InternalServerError, `${e.constructor.name}: ${e.message}`);
        return true;
      });
    });
  },
};

// All at once: without a majority each request waits until its server gives up.
describe(process.env.TERCET_STATE, { concurrency: true }, () => {
  nodes.forEach((node, index) => states[process.env.TERCET_STATE](node, `${node.role} ${index}`));
});
