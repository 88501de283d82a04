import { answer, consume } from "@/lib/messages";

export async function GET(request) {
  const consumer = request.nextUrl.searchParams.get("consumer") || "default";
  return answer(async () => Response.json({ message: await consume(consumer) }, { headers: { "Cache-Control": "no-store" } }));
}
