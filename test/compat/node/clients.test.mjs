// Every Node client does the same work: connect, produce, group, blocking consume, ack, pending, claim, trim, a transaction,
// a pipeline; and goes on after the leader was killed, on a connection to another node that never broke.
import test from "node:test";
import assert from "node:assert/strict";
import { GlideClient, GlideClusterClient, Batch, ProtocolVersion } from "@valkey/valkey-glide";
import IoValkey from "iovalkey";
import IoRedis5 from "ioredis5";
import IoRedis6 from "ioredis6";
import { createClient as createClient4 } from "redis4";
import { createClient as createClient5 } from "redis5";
import { createClient as createClient6 } from "redis6";
import { leader, follower, killLeader, unique, sleep } from "./cluster.mjs";

const text = (v) => (v === null || v === undefined ? v : Array.isArray(v) ? v.map(text) : typeof v === "object" && !Buffer.isBuffer(v) ? v : String(v));

// Each adapter opens a connection and offers: call(...args), multi([args, …]), close().
const adapters = {
  "valkey-glide RESP3": (at) => glide(at, ProtocolVersion.RESP3),
  "valkey-glide RESP2": (at) => glide(at, ProtocolVersion.RESP2),
  iovalkey: (at) => io(IoValkey, at),
  "ioredis 5": (at) => io(IoRedis5, at),
  "ioredis 6": (at) => io(IoRedis6, at),
  "redis 4": (at) => nodeRedis(createClient4, at),
  "redis 5": (at) => nodeRedis(createClient5, at),
  "redis 5 RESP3": (at) => nodeRedis(createClient5, at, 3),
  "redis 6": (at) => nodeRedis(createClient6, at),
};

async function glide(at, protocol) {
  const client = await GlideClient.createClient({ addresses: [at], requestTimeout: 10000, protocol });
  return {
    call: (...args) => client.customCommand(args.map(String)),
    multi: async (list) => {
      const batch = new Batch(true);
      for (const args of list) batch.customCommand(args.map(String));
      return client.exec(batch, true);
    },
    close: () => client.close(),
  };
}

async function io(Client, at) {
  const client = new Client(at.port, at.host, { lazyConnect: true });
  client.on("error", () => {});
  await client.connect();
  return {
    call: (...args) => client.call(...args.map(String)),
    multi: async (list) => (await client.multi(list.map(([name, ...args]) => ["call", name, ...args.map(String)])).exec()).map(([err, value]) => { if (err) throw err; return value; }),
    close: () => client.disconnect(),
  };
}

async function nodeRedis(create, at, RESP) {
  const client = create({ socket: at, ...(RESP ? { RESP } : {}) });
  client.on("error", () => {});
  await client.connect();
  return {
    call: (...args) => client.sendCommand(args.map(String)),
    multi: async (list) => {
      const m = client.multi();
      for (const args of list) m.addCommand(args.map(String));
      return m.exec();
    },
    close: () => (client.destroy ? client.destroy() : client.disconnect()),
  };
}

// ids finds the entry IDs in a reply to XREADGROUP, whichever shape the client gives it.
const ids = (reply) => (JSON.stringify(reply, (_, v) => (v instanceof Map ? [...v] : v)) ?? "").match(/\d{10,}-\d+/g) ?? [];

for (const [name, connect] of Object.entries(adapters)) {
  for (const [role, at] of [["leader", leader], ["follower", follower]]) {
    test(`${name} through the ${role}`, { timeout: 60000 }, async () => {
      const c = await connect(at);
      const blocked = await connect(at);
      try {
        const s = unique("orders");
        assert.equal(text(await c.call("PING")), "PONG");
        assert.equal(text(await c.call("XGROUP", "CREATE", s, "g", "$", "MKSTREAM")), "OK");
        await assert.rejects(c.call("XGROUP", "CREATE", s, "g", "$"), /BUSYGROUP/);

        // A blocked consumer is given what comes.
        const waiting = blocked.call("XREADGROUP", "GROUP", "g", "c1", "COUNT", "1", "BLOCK", "20000", "STREAMS", s, ">");
        await sleep(30);
        const first = text(await c.call("XADD", s, "*", "n", "1"));
        assert.deepEqual(ids(await waiting), [first]);
        assert.equal(text(await blocked.call("XREADGROUP", "GROUP", "g", "c1", "BLOCK", "10", "STREAMS", s, ">")), null);

        // A pipeline: written together, answered in order.
        const added = await Promise.all(Array.from({ length: 50 }, (_, i) => c.call("XADD", s, "*", "n", i)));
        const order = added.map(text);
        assert.equal(new Set(order).size, 50);
        assert.deepEqual(ids(await c.call("XRANGE", s, `(${first}`, "+")), order);

        assert.deepEqual(ids(await c.call("XREADGROUP", "GROUP", "g", "c2", "COUNT", "3", "STREAMS", s, ">")), order.slice(0, 3));
        assert.equal(Number(await c.call("XACK", s, "g", first, order[0])), 2);
        assert.equal(Number((await c.call("XPENDING", s, "g"))[0]), 2);
        assert.deepEqual(ids(await c.call("XCLAIM", s, "g", "c3", "0", order[1])), [order[1]]);
        assert.deepEqual(ids(await c.call("XAUTOCLAIM", s, "g", "c3", "0", "0-0", "COUNT", "10")).filter((id) => order.includes(id)), order.slice(1, 3));
        assert.equal(Number(await c.call("XTRIM", s, "MAXLEN", "10")), 41);
        assert.equal(Number(await c.call("XLEN", s)), 10);

        const done = await c.multi([["XADD", s, "*", "n", "tx"], ["XLEN", s], ["XACK", s, "g", order[1]]]);
        assert.equal(done.length, 3);
        assert.equal(Number(done[1]), 11);
        assert.equal(Number(done[2]), 1);

        assert.equal(text(await c.call("SET", `${s}:lock`, "me", "NX", "PX", "10000")), "OK");
        assert.equal(text(await c.call("SET", `${s}:lock`, "you", "NX", "PX", "10000")), null);
        assert.equal(text(await c.call("GET", `${s}:lock`)), "me");
        assert.equal(Number(await c.call("DEL", s, `${s}:lock`)), 2);
      } finally {
        c.close();
        blocked.close();
      }
    });
  }
}

test("the leader is killed under all clients", { timeout: 90000 }, async () => {
  const clients = [];
  try {
    for (const [name, connect] of Object.entries(adapters)) {
      const s = unique("failover");
      const c = await connect(follower);
      const blocked = await connect(follower);
      clients.push({ name, s, c, blocked, acknowledged: [], unknown: 0 });
      await c.call("XGROUP", "CREATE", s, "g", "$", "MKSTREAM");
    }
    let stop = false;
    const load = clients.map(async (k) => {
      for (let i = 0; !stop; i++) {
        try {
          k.acknowledged.push(text(await k.c.call("XADD", k.s, "*", "n", i)));
        } catch (error) {
          // Nothing else may come out of an election: neither a broken connection nor a made-up refusal.
          assert.match(String(error), /outcome unknown|CLUSTERDOWN|TRYAGAIN/, k.name);
          k.unknown++;
        }
        await sleep(5);
      }
    });
    await sleep(200);
    const waiting = clients.map((k) => k.blocked.call("XREADGROUP", "GROUP", "other", "c", "BLOCK", "30000", "STREAMS", `${k.s}:wait`, ">").catch((error) => error));
    for (const error of await Promise.all(waiting)) assert.match(String(error), /NOGROUP/);
    for (const k of clients) await k.c.call("XGROUP", "CREATE", `${k.s}:wait`, "other", "$", "MKSTREAM");
    const blocked = clients.map((k) => k.blocked.call("XREADGROUP", "GROUP", "other", "c", "BLOCK", "60000", "STREAMS", `${k.s}:wait`, ">"));
    await sleep(100);
    await killLeader();
    await sleep(3000);
    stop = true;
    await Promise.all(load);
    for (const [i, k] of clients.entries()) {
      const id = text(await k.c.call("XADD", `${k.s}:wait`, "*", "after", "election"));
      assert.deepEqual(ids(await blocked[i]), [id], `${k.name}: the blocked read went on`);
      const stored = ids(await k.c.call("XRANGE", k.s, "-", "+"));
      assert.equal(new Set(stored).size, stored.length);
      for (const id of k.acknowledged) assert.ok(stored.includes(id), `${k.name}: ${id} was acknowledged and is gone`);
      assert.ok(stored.length <= k.acknowledged.length + k.unknown, `${k.name}: ${stored.length} stored, ${k.acknowledged.length} acknowledged, ${k.unknown} unknown`);
      assert.ok(k.acknowledged.length > 50, `${k.name}: only ${k.acknowledged.length} were acknowledged`);
    }
  } finally {
    for (const k of clients) {
      k.c.close();
      k.blocked.close();
    }
  }
});
