import express from "express";
import { QueueClient } from "@vercel/queue";
import { signed } from "./signed.js";

// The one change against Vercel: where the queue is.
const queue = new QueueClient({
  region: "iad1",
  resolveBaseUrl: () => new URL(process.env.TERCET_URL ?? "http://127.0.0.1:7301"),
  token: process.env.TERCET_TOKEN ?? "none",
  deploymentId: process.env.DEPLOYMENT_ID ?? null,
});

const app = express();

// When the handler returns, the message is acknowledged; when it throws, the message comes again.
app.post("/api/queues/process-order", signed(queue.handleNodeCallback(async (order, metadata) => {
  console.log(`order ${order.id}, message ${metadata.messageId}, delivery ${metadata.deliveryCount}`);
})));

const server = app.listen(process.env.PORT ?? 3000, "127.0.0.1", (error) => {
  if (error) throw error; // the port is taken, for instance
  console.log(`listening on ${server.address().port}`);
});
