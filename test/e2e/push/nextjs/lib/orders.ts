// In place of the example's: it tells the test what arrived, and fails when the order says so.
export type Order = { id: number; failOn?: number[]; padding?: string };

type Metadata = { messageId: string; deliveryCount: number };

export async function processOrder(order: Order, metadata: Metadata): Promise<void> {
  const answer = await fetch(process.env.TEST_REPORT!, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ order, metadata }),
  });
  if (!answer.ok) throw new Error(`report: ${answer.status}`);
  if (order.failOn?.includes(metadata.deliveryCount)) throw new Error("the order says so");
}
