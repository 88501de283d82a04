// What the tests share: where the nodes are, who the clients are, and how a node is killed.
import { readFileSync } from "node:fs";

const nodes = (process.env.TERCET_VALKEY ?? "").split(",").filter(Boolean);
if (nodes.length === 0) {
  throw new Error("TERCET_VALKEY is not set: run these tests through `go test ./test/compat`");
}

// leader and follower are addresses; the first in the list leads when the tests begin.
export const leader = parse(nodes[0]);
export const follower = parse(nodes[nodes.length - 1]);

function parse(address) {
  const at = address.lastIndexOf(":");
  return { host: address.slice(0, at), port: Number(address.slice(at + 1)) };
}

// inCluster says that the nodes present themselves as a cluster.
export const inCluster = process.env.TERCET_VALKEY_MODE === "cluster";

// secured is what clients need where a password and TLS are asked for, undefined elsewhere. In the form of ioredis.
export const secured = process.env.TERCET_VALKEY_CA ? {
  username: process.env.TERCET_VALKEY_USER,
  password: process.env.TERCET_VALKEY_PASSWORD,
  tls: { ca: readFileSync(process.env.TERCET_VALKEY_CA) },
} : undefined;

// killLeader kills the node that leads with SIGKILL, and returns its address when it is gone. The test's runner starts it again.
export async function killLeader() {
  const response = await fetch(`${process.env.TERCET_CONTROL}/kill-leader`, { method: "POST" });
  const body = await response.text();
  if (!response.ok) throw new Error(`kill the leader: ${body}`);
  return parse(body);
}

// unique makes a key that no other test uses.
let next = 0;
export const unique = (name) => `${name}-${process.pid}-${next++}`;

export const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
