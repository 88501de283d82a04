// Clicks through the running application: two visitors write, two reviewers review, somebody acknowledges by ID.
//
//   APP_URL=http://localhost:3000 npm test
//
// CHROMIUM is the browser (default /usr/bin/chromium), SCREENSHOTS a folder to leave pictures in. DURING is a URL that is
// posted to in the middle: the test of Tercet kills the leading node there.
import assert from "node:assert/strict";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { chromium } from "playwright-core";

const app = process.env.APP_URL ?? "http://localhost:3000";
const profile = await mkdtemp(join(tmpdir(), "contact-form-"));
const browser = await chromium.launchPersistentContext(profile, {
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  headless: true,
  viewport: { width: 900, height: 640 },
  args: [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
  ],
});
browser.setDefaultTimeout(60000);

async function open(path) {
  const page = await browser.newPage();
  // An error of the page's own code is a failure even when nothing looks wrong.
  page.on("pageerror", (error) => {
    console.error(`${path}: ${error.stack}`);
    process.exitCode = 1;
  });
  await page.goto(app + path, { waitUntil: "networkidle" });
  return page;
}

let pictures = 0;
async function picture(page, name) {
  if (process.env.SCREENSHOTS) await page.screenshot({ path: join(process.env.SCREENSHOTS, `${++pictures}-${name}.png`) });
}

// write fills in the form and returns the ID that the page shows.
async function write(page, name, message) {
  await page.getByLabel("Name").fill(name);
  await page.getByLabel("Email").fill(`${name.toLowerCase()}@example.com`);
  await page.getByLabel("Message").fill(message);
  const answered = page.waitForResponse((r) => r.url().endsWith("/api/messages/produce"));
  await page.getByRole("button", { name: "Send" }).click();
  const response = await answered;
  assert.equal(response.status(), 201);
  const { messageId, timestamp } = await response.json();
  assert.ok(Date.parse(timestamp) > 0);
  await page.getByRole("status").getByText(messageId).waitFor();
  assert.equal(await page.getByLabel("Message").inputValue(), "", "the form is empty again");
  return messageId;
}

// shown returns what a reviewer's page shows: a message, or null when there is nothing to review.
async function shown(page) {
  const message = page.getByRole("article", { name: "Message" });
  await message.or(page.getByText("Nothing to review.")).waitFor();
  if ((await message.count()) === 0) return null;
  return { id: await message.locator("code").innerText(), text: await message.locator("> p").innerText(), count: await message.locator("footer span").innerText() };
}

try {
  const desk = await open("/review?consumer=early");
  assert.equal(await shown(desk), null, "nothing was written yet");

  const form = await open("/");
  await picture(form, "write");
  // The browser does not send a form without a message.
  await form.getByLabel("Name").fill("Ada");
  await form.getByLabel("Email").fill("ada@example.com");
  await form.getByRole("button", { name: "Send" }).click();
  assert.equal(await form.getByLabel("Message").evaluate((field) => field.validity.valueMissing), true);

  const text = "Grüße & <b>markup</b> stay what they are:\n  two lines 漢字 🎈";
  const first = await write(form, "Ada", text);
  await picture(form, "written");
  const second = await write(form, "Bob", "Where is my order?");
  assert.notEqual(first, second);

  // Two reviewers have two messages, and each keeps theirs over a reload.
  const ann = await open("/review?consumer=ann");
  assert.deepEqual(await shown(ann), { id: first, text, count: "first delivery" });
  await picture(ann, "review");
  const ben = await open("/review");
  await ben.getByLabel("Reviewer").fill("ben");
  // "default" looked first and was given the second message: as ben nothing is left.
  assert.equal((await shown(ben)).id, second);
  await ben.getByRole("button", { name: "Show mine" }).click();
  await ben.getByText("Nothing to review.").waitFor();
  await ann.reload();
  assert.deepEqual(await shown(ann), { id: first, text, count: "first delivery" });

  await ann.getByRole("button", { name: "Acknowledge", exact: true }).click();
  await ann.getByText("Nothing to review.").waitFor();
  await picture(ann, "nothing");

  if (process.env.DURING) {
    const done = await fetch(process.env.DURING, { method: "POST" });
    assert.equal(done.status, 200, await done.text());
  }

  // By ID: the link leads there; once, and then no more.
  await ben.getByLabel("Reviewer").fill("default");
  await ben.getByRole("button", { name: "Show mine" }).click();
  await ben.getByRole("link", { name: second }).click();
  await ben.waitForURL("**/acknowledge?id=*");
  const button = ben.getByRole("button", { name: "Acknowledge" });
  assert.equal(await ben.getByLabel("Message ID").inputValue(), second);
  await button.click();
  await ben.getByText("is acknowledged.").waitFor();
  await picture(ben, "acknowledged");
  await button.click();
  await ben.getByText("was with no reviewer").waitFor();
  await ben.getByLabel("Message ID").fill("not an id");
  await button.click();
  await ben.getByText("not an id").waitFor();

  // The whole way once more, by the pages' own links.
  await ben.getByRole("link", { name: "Write" }).click();
  const third = await write(ben, "Cleo", "Again.");
  await ben.getByRole("link", { name: "Review" }).click();
  assert.equal((await shown(ben)).id, third);
  await ben.getByRole("button", { name: "Acknowledge", exact: true }).click();
  await ben.getByText("Nothing to review.").waitFor();
  console.log(`clicked through: ${first} ${second} ${third}`);
} finally {
  await browser.close();
  await rm(profile, { recursive: true, force: true });
}
