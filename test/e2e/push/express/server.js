// The example's routes, with handlers that tell the test what arrived and fail when the order says so, for both releases
// of the client.
import express from "express";
import { QueueClient } from "@vercel/queue";
import { QueueClient as OldestClient } from "queue-oldest";
import { signed } from "./signed.js";

const options = { region: "iad1", resolveBaseUrl: () => new URL(process.env.TERCET_URL), token: "none", deploymentId: null };
const newest = new QueueClient(options);
const oldest = new OldestClient(options);

async function processOrder(order, metadata) {
  const answer = await fetch(process.env.TEST_REPORT, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ order, metadata }),
  });
  if (!answer.ok) throw new Error(`report: ${answer.status}`);
  if (order.failOn?.includes(metadata.deliveryCount)) throw new Error("the order says so");
}

const app = express();
app.post("/api/queues/process-order", signed(newest.handleNodeCallback(processOrder)));
app.post("/api/queues/oldest", signed(oldest.handleNodeCallback(processOrder)));
app.post("/api/queues/retry", signed(newest.handleNodeCallback(processOrder, { retry: () => ({ afterSeconds: 600 }) })));
app.listen(process.env.PORT, "127.0.0.1");
