// The contact-form template's use of valkey-glide, command by command: the client it makes, the ping before each request,
// and what its three handlers send (specification, section 1).
import test from "node:test";
import assert from "node:assert/strict";
import { GlideClient, TimeUnit } from "@valkey/valkey-glide";
import { leader, follower, unique } from "./cluster.mjs";

const group = "contact-processors";

async function connect(address) {
  const client = await GlideClient.createClient({
    addresses: [address],
    requestTimeout: 5000,
    clientName: "vercel_message_queue_client",
  });
  await client.ping();
  return client;
}

async function produce(client, stream, form) {
  await client.ping();
  return client.xadd(
    stream,
    [
      ["name", form.name],
      ["email", form.email],
      ["message", form.message],
      ["timestamp", new Date().toISOString()],
    ],
    { trim: { method: "maxlen", threshold: 10000, exact: false } },
  );
}

async function createGroup(client, stream) {
  try {
    await client.xgroupCreate(stream, group, "0", { mkStream: true });
  } catch (error) {
    if (!String(error).includes("BUSYGROUP")) throw error;
  }
}

const fields = (pairs) => Object.fromEntries(pairs.map(([k, v]) => [String(k), String(v)]));

async function consume(client, stream, consumer) {
  await client.ping();
  const [, claimed] = await client.xautoclaim(stream, group, consumer, 60000, "0-0", { count: 1 });
  for (const [id, pairs] of Object.entries(claimed)) return { id, claimed: true, ...fields(pairs) };
  const read = await client.xreadgroup(group, consumer, { [stream]: ">" }, { count: 1 });
  if (!read) return null;
  for (const { value } of read) {
    for (const [id, pairs] of Object.entries(value)) return { id, ...fields(pairs) };
  }
  return null;
}

for (const [role, address] of [["leader", leader], ["follower", follower]]) {
  test(`the template through the ${role}`, async () => {
    const stream = unique("contact-messages");
    const client = await connect(address);
    try {
      await createGroup(client, stream);
      await createGroup(client, stream); // a second process: BUSYGROUP
      assert.equal(await consume(client, stream, "consumer-default"), null);
      const first = await produce(client, stream, { name: "Ada", email: "ada@example.com", message: "häll\u00f6 <b>" });
      const second = await produce(client, stream, { name: "Bob", email: "bob@example.com", message: "two" });
      assert.match(first, /^\d+-\d+$/);
      assert.notEqual(first, second);

      const one = await consume(client, stream, "consumer-a");
      assert.equal(one.id, first);
      assert.equal(one.name, "Ada");
      assert.equal(one.message, "häll\u00f6 <b>");
      assert.ok(Date.parse(one.timestamp) > 0);
      const two = await consume(client, stream, "consumer-b");
      assert.equal(two.id, second);
      assert.equal(await consume(client, stream, "consumer-a"), null); // pending for less than a minute

      assert.equal(await client.xack(stream, group, [first]), 1);
      assert.equal(await client.xack(stream, group, [first]), 0);
      const pending = await client.xpending(stream, group);
      assert.equal(pending[0], 1);
      assert.equal(await client.xlen(stream), 2); // acknowledged entries stay

      // The README's troubleshooting.
      assert.equal(await client.xgroupDestroy(stream, group), true);
      assert.equal(await client.del([stream]), 1);
      await assert.rejects(consume(client, stream, "consumer-a"), /NOGROUP/);
    } finally {
      client.close();
    }
  });
}

test("wire sequence with customCommand, as in the template's first version", async () => {
  const stream = unique("contact-messages");
  const client = await connect(leader);
  try {
    const run = (...args) => client.customCommand(args);
    assert.equal(await run("XGROUP", "CREATE", stream, group, "0", "MKSTREAM"), "OK");
    const id = await run("XADD", stream, "MAXLEN", "~", "10000", "*", "name", "n", "email", "e", "message", "m", "timestamp", "t");
    assert.match(String(id), /^\d+-\d+$/);
    const claimed = await run("XAUTOCLAIM", stream, group, "consumer-x", "60000", "0-0", "COUNT", "1");
    assert.equal(claimed.length, 3);
    assert.equal(String(claimed[0]), "0-0");
    const read = await run("XREADGROUP", "GROUP", group, "consumer-x", "COUNT", "1", "STREAMS", stream, ">");
    assert.equal(read.length, 1); // a map of one stream
    assert.equal(Number(await run("XACK", stream, group, String(id))), 1);
    const info = String(await run("INFO", "REPLICATION"));
    assert.match(info, /role:master/);
  } finally {
    client.close();
  }
});
