// Every Node client does the same work: connect, produce, group, blocking consume, ack, pending, claim, trim, a transaction,
// a pipeline; and goes on after the leader was killed, on a connection to another node that never broke.
import test from "node:test";
import assert from "node:assert/strict";
import { GlideClient, GlideClusterClient, Batch, ClusterBatch, ProtocolVersion } from "@valkey/valkey-glide";
import IoValkey from "iovalkey";
import IoRedis5 from "ioredis5";
import IoRedis6 from "ioredis6";
import { createClient as createClient4, createCluster as createCluster4 } from "redis4";
import { createClient as createClient5, createCluster as createCluster5 } from "redis5";
import { createClient as createClient6, createCluster as createCluster6 } from "redis6";
import { leader, follower, inCluster, killLeader, secured, unique, sleep } from "./cluster.mjs";

const text = (v) => (v === null || v === undefined ? v : Array.isArray(v) ? v.map(text) : typeof v === "object" && !Buffer.isBuffer(v) ? v : String(v));

// Each adapter opens a connection and offers: call(...args), multi([args, …]), close().
const standalone = {
  "valkey-glide RESP3": (at) => glide(at, ProtocolVersion.RESP3),
  "valkey-glide RESP2": (at) => glide(at, ProtocolVersion.RESP2),
  iovalkey: (at) => io(IoValkey, at),
  "ioredis 5": (at) => io(IoRedis5, at),
  "ioredis 6": (at) => io(IoRedis6, at),
  "ioredis 6 RESP2": (at) => io(IoRedis6, at, { protocol: 2 }),
  "redis 4": (at) => nodeRedis(createClient4, at),
  "redis 5": (at) => nodeRedis(createClient5, at),
  "redis 5 RESP3": (at) => nodeRedis(createClient5, at, 3),
  "redis 6": (at) => nodeRedis(createClient6, at),
  "redis 6 RESP2": (at) => nodeRedis(createClient6, at, 2),
};

// Clients of a cluster learn from one node where the others are, and follow MOVED.
const cluster = {
  "valkey-glide cluster RESP3": (at) => glide(at, ProtocolVersion.RESP3),
  "valkey-glide cluster RESP2": (at) => glide(at, ProtocolVersion.RESP2),
  "iovalkey cluster": (at) => ioCluster(IoValkey, at),
  "ioredis 5 cluster": (at) => ioCluster(IoRedis5, at),
  "ioredis 6 cluster": (at) => ioCluster(IoRedis6, at),
  "redis 4 cluster": (at) => nodeRedisCluster(createCluster4, at),
  "redis 5 cluster": (at) => nodeRedisCluster(createCluster5, at),
  "redis 6 cluster": (at) => nodeRedisCluster(createCluster6, at),
};

const adapters = inCluster ? cluster : standalone;

async function glide(at, protocol) {
  const options = {
    addresses: [at], requestTimeout: 10000, protocol,
    ...(secured && {
      credentials: { username: secured.username, password: secured.password },
      useTLS: true,
      advancedConfiguration: { tlsAdvancedConfiguration: { rootCertificates: secured.tls.ca } },
    }),
  };
  const client = await (inCluster ? GlideClusterClient : GlideClient).createClient(options);
  return {
    call: (...args) => client.customCommand(args.map(String)),
    multi: async (list) => {
      const batch = inCluster ? new ClusterBatch(true) : new Batch(true);
      for (const args of list) batch.customCommand(args.map(String));
      return client.exec(batch, true);
    },
    close: () => client.close(),
  };
}

const ioMulti = (client) => async (list) =>
  (await client.multi(list.map(([name, ...args]) => ["call", name, ...args.map(String)])).exec()).map(([err, value]) => {
    if (err) throw err;
    return value;
  });

async function io(Client, at, more) {
  const client = new Client(at.port, at.host, { lazyConnect: true, ...secured, ...more });
  client.on("error", () => {});
  await client.connect();
  return { call: (...args) => client.call(...args.map(String)), multi: ioMulti(client), close: () => client.disconnect() };
}

async function ioCluster(Client, at) {
  const client = new Client.Cluster([at], { lazyConnect: true, redisOptions: { ...secured } });
  client.on("error", () => {});
  await client.connect();
  return { call: (...args) => client.call(...args.map(String)), multi: ioMulti(client), close: () => client.disconnect() };
}

const nodeRedisOptions = (socket) => ({
  socket: secured ? { ...socket, tls: true, ...secured.tls } : { ...socket },
  ...(secured && { username: secured.username, password: secured.password }),
});

async function nodeRedis(create, at, RESP) {
  const client = create({ ...nodeRedisOptions(at), ...(RESP && { RESP }) });
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

async function nodeRedisCluster(create, at) {
  const client = create({ rootNodes: [nodeRedisOptions(at)], defaults: nodeRedisOptions({}) });
  client.on("error", () => {});
  await client.connect();
  return {
    call: (...args) => client.sendCommand(keyOf(args), false, args.map(String)),
    multi: async (list) => {
      const m = client.multi(list[0][1]);
      // The fourth version does not ask whether a command only reads.
      for (const args of list) m.addCommand(...(create === createCluster4 ? [args[1]] : [args[1], false]), args.map(String));
      return m.exec();
    },
    close: () => (client.destroy ? client.destroy() : client.disconnect()),
  };
}

// keyOf finds a command's first key, which node-redis has to be told of in a cluster.
function keyOf(args) {
  const name = String(args[0]).toUpperCase();
  if (name === "PING") return undefined;
  if (name.startsWith("XREAD")) return String(args[args.indexOf("STREAMS") + 1]);
  return String(args[name === "XGROUP" ? 2 : 1]);
}

// ids finds the entry IDs in a reply to XREADGROUP, whichever shape the client gives it.
const ids = (reply) => (JSON.stringify(reply, (_, v) => (v instanceof Map ? [...v] : v)) ?? "").match(/\d{10,}-\d+/g) ?? [];

for (const [name, connect] of Object.entries(adapters)) {
  for (const [role, at] of [["leader", leader], ["follower", follower]]) {
    test(`${name} through the ${role}`, { timeout: 60000 }, async () => {
      const c = await connect(at);
      const blocked = await connect(at);
      try {
        const s = `{${unique("orders")}}`;
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

// waitFor polls a condition that nothing announces. The deadline is against hanging.
async function waitFor(what, ok) {
  const deadline = Date.now() + 120000;
  while (!ok()) {
    if (Date.now() > deadline) throw new Error(`waited in vain for ${what}`);
    await sleep(20);
  }
}

// Clients on nodes that live notice nothing of the leader's death: no connection breaks, and no command fails unless its
// outcome is unknown. Those on the leader itself, and cluster clients, which all are, come back by their own means.
test("the leader is killed under all clients", { timeout: 240000 }, async () => {
  const clients = [];
  let stop = false;
  try {
    for (const [name, connect] of Object.entries(adapters)) {
      for (const at of [leader, follower]) {
        const s = `{${unique("failover")}}`;
        const c = await connect(at);
        const blocked = await connect(at);
        clients.push({ name: `${name} on ${at.port}`, at, s, c, blocked, acknowledged: [], errors: [], got: [] });
        for (const key of [s, `${s}:wait`]) await c.call("XGROUP", "CREATE", key, "g", "$", "MKSTREAM");
      }
    }
    const load = clients.map(async (k) => {
      for (let i = 0; !stop; i++) {
        try {
          k.acknowledged.push(text(await k.c.call("XADD", k.s, "*", "n", i)));
        } catch (error) {
          k.errors.push(error);
        }
        await sleep(20);
      }
    });
    const waiting = clients.map(async (k) => {
      while (!stop && k.got.length === 0) {
        try {
          k.got = ids(await k.blocked.call("XREADGROUP", "GROUP", "g", "c", "BLOCK", "5000", "STREAMS", `${k.s}:wait`, ">"));
        } catch (error) {
          k.errors.push(error);
          await sleep(20);
        }
      }
    });
    for (const k of clients) await waitFor(`${k.name} to write`, () => k.acknowledged.length >= 10);
    const killed = await killLeader();
    for (const k of clients) {
      const before = k.acknowledged.length;
      await waitFor(`${k.name} to go on`, () => k.acknowledged.length >= before + 20);
    }
    for (const k of clients) {
      const id = text(await k.c.call("XADD", `${k.s}:wait`, "*", "after", "election"));
      await waitFor(`${k.name}'s blocked read`, () => k.got.length > 0);
      assert.deepEqual(k.got, [id], `${k.name}: the blocked read went on`);
    }
    stop = true;
    await Promise.all([...load, ...waiting]);
    for (const k of clients) {
      const stored = ids(await k.c.call("XRANGE", k.s, "-", "+"));
      assert.equal(new Set(stored).size, stored.length);
      for (const id of k.acknowledged) assert.ok(stored.includes(id), `${k.name}: ${id} was acknowledged and is gone`);
      if (inCluster || k.at.port === killed.port) continue; // some repeat by themselves what may have happened
      for (const error of k.errors) assert.match(String(error), /outcome unknown|CLUSTERDOWN|TRYAGAIN/, k.name);
      assert.ok(stored.length <= k.acknowledged.length + k.errors.length, `${k.name}: ${stored.length} stored, ${k.acknowledged.length} acknowledged, ${k.errors.length} unknown`);
    }
  } finally {
    stop = true;
    for (const k of clients) {
      k.c.close();
      k.blocked.close();
    }
  }
});
