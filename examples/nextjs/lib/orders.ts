import type { MessageMetadata } from "@vercel/queue";

export type Order = { id: number };

// processOrder is the application. When it returns, the message is acknowledged; when it throws, it comes again.
export async function processOrder(order: Order, metadata: MessageMetadata): Promise<void> {
  console.log(`order ${order.id}, message ${metadata.messageId}, delivery ${metadata.deliveryCount}`);
}
