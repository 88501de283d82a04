import { createHmac, timingSafeEqual } from "node:crypto";

type Handler = (request: Request) => Promise<Response>;

// signed lets nobody in but the queue: it checks the signature (Standard Webhooks) and hands the request on as it was.
export function signed(handler: Handler, secret = process.env.WEBHOOK_SECRET): Handler {
  return async (request) => {
    const body = Buffer.from(await request.arrayBuffer());
    const [id, time, signatures] = ["id", "timestamp", "signature"].map((n) => request.headers.get(`webhook-${n}`) ?? "");
    const fresh = Math.abs(Date.now() / 1000 - Number(time)) < 300;
    const key = Buffer.from((secret ?? "").replace(/^whsec_/, ""), "base64");
    const want = createHmac("sha256", key).update(`${id}.${time}.`).update(body).digest();
    const good = signatures.split(" ").some((s) => {
      const got = Buffer.from(s.replace(/^v1,/, ""), "base64");
      return got.length === want.length && timingSafeEqual(got, want);
    });
    if (!key.length || !fresh || !good) return Response.json({ error: "not signed by the queue" }, { status: 401 });
    return handler(new Request(request.url, { method: "POST", headers: request.headers, body: body.length ? body : undefined }));
  };
}
