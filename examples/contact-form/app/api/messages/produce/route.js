import { answer, produce, strings } from "@/lib/messages";

export async function POST(request) {
  const form = await strings(request);
  for (const field of ["name", "email", "message"]) {
    if (!form[field]) return Response.json({ error: `${field} is required` }, { status: 400 });
  }
  return answer(async () => Response.json(await produce(form), { status: 201 }));
}
