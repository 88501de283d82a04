import { acknowledge, answer, strings } from "@/lib/messages";

export async function POST(request) {
  const { messageId } = await strings(request);
  if (!messageId) return Response.json({ error: "messageId is required" }, { status: 400 });
  return answer(async () => Response.json({ success: true, acknowledged: await acknowledge(messageId) }));
}
