// The same with the oldest release of the client.
import { QueueClient } from "queue-oldest";
import { processOrder } from "@/lib/orders";
import { signed } from "@/lib/signed";

const queue = new QueueClient({
  region: "iad1",
  resolveBaseUrl: () => new URL(process.env.TERCET_URL!),
  token: "none",
  deploymentId: null,
});

export const POST = signed(queue.handleCallback(processOrder));
