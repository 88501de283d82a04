// The newest client and the oldest send and receive through the followers while the leader is killed. TERCET_VICTIM is its
// process.
import assert from "node:assert/strict";
import { test } from "node:test";
import { setTimeout as pause } from "node:timers/promises";
import * as newest from "@vercel/queue";
import * as oldest from "queue-oldest";
import { advance, clientOf, HandlerError, nodes } from "./cluster.mjs";

const followers = nodes.filter((node) => node.role === "follower");
const count = 200;
const victim = Number(process.env.TERCET_VICTIM);

test("the leader is killed amid sends and receives", { timeout: 170_000 }, async () => {
  console.warn = console.error = () => {}; // the clients complain of what they try again
  let done = 0;
  let killed = false;
  const progress = () => {
    if (!killed && ++done >= count / 2) {
      killed = true;
      process.kill(victim, "SIGKILL");
    }
  };
  await Promise.all(
    Object.entries({ newest, oldest }).map(async ([release, sdk]) => {
      const topic = `sdk-failover-${release}`;
      const seen = new Map();
      const failed = new Set();
      let allSent = false;
      const sending = async () => {
        const queue = clientOf(sdk, followers[0]);
        for (let i = 0; i < count; i++) {
          for (let sent = false; !sent; ) {
            try {
              // The same key: what was sent without an answer is not stored twice.
              await queue.send(topic, { i }, { idempotencyKey: `k${i}` });
              sent = true;
            } catch {
              await pause(50);
            }
          }
        }
        allSent = true;
      };
      const receiving = async () => {
        const queue = clientOf(sdk, followers[1]);
        const handler = async ({ i }, { messageId }) => {
          if (i % 20 === 0 && !failed.has(i)) {
            failed.add(i);
            throw new HandlerError("the first time");
          }
          if (!seen.has(i)) progress();
          seen.set(i, (seen.get(i) ?? new Set()).add(messageId));
        };
        while (seen.size < count) {
          let result;
          try {
            result = await queue.receive(topic, "g", handler, { retry: () => ({ afterSeconds: 1 }) });
          } catch {
            await pause(50);
            continue;
          }
          if (result.ok) continue;
          // What the dead leader had given away comes again when its lease is over.
          if (allSent) await advance(followers[1], 301).catch(() => {});
          await pause(20);
        }
      };
      await Promise.all([sending(), receiving()]);
      assert.equal(seen.size, count, release);
      assert.equal(failed.size, count / 20, release);
      for (const [i, ids] of seen) assert.equal(ids.size, 1, `${release}: message ${i} was stored as ${[...ids]}`);
    }),
  );
  assert.ok(killed);
});
