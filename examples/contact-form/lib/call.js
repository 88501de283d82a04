/** Calls a route of this application and returns its document; what it refuses is thrown with its reason. */
export async function call(path, body) {
  const response = await fetch(`/api/messages/${path}`, body && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  const document = await response.json();
  if (!response.ok) throw new Error(document.error);
  return document;
}
