import { createHmac, timingSafeEqual } from "node:crypto";
import express from "express";

// signed lets nobody in but the queue: it checks the signature (Standard Webhooks) over the body as it came, and then
// parses JSON, as handleNodeCallback expects it to be.
export function signed(handler, secret = process.env.WEBHOOK_SECRET ?? "") {
  const key = Buffer.from(secret.replace(/^whsec_/, ""), "base64");
  return [express.raw({ type: () => true, limit: "1mb" }), (req, res) => {
    const body = Buffer.isBuffer(req.body) ? req.body : Buffer.alloc(0);
    const [id, time, signatures] = ["id", "timestamp", "signature"].map((n) => req.get(`webhook-${n}`) ?? "");
    const fresh = Math.abs(Date.now() / 1000 - Number(time)) < 300;
    const want = createHmac("sha256", key).update(`${id}.${time}.`).update(body).digest();
    const good = signatures.split(" ").some((s) => {
      const got = Buffer.from(s.replace(/^v1,/, ""), "base64");
      return got.length === want.length && timingSafeEqual(got, want);
    });
    if (!key.length || !fresh || !good) return res.status(401).json({ error: "not signed by the queue" });
    req.body = req.is("json", "+json") ? JSON.parse(body) : body;
    return handler(req, res);
  }];
}
