import { QueueClient } from "@vercel/queue";

// The one change against Vercel: where the queue is. Without a region of its own, a push is answered where it came from.
export const queue = new QueueClient({
  region: "iad1",
  resolveBaseUrl: () => new URL(process.env.TERCET_URL ?? "http://127.0.0.1:7301"),
  token: process.env.TERCET_TOKEN ?? "none",
  deploymentId: process.env.DEPLOYMENT_ID ?? null,
});
