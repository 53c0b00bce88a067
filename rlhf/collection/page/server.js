// One request of the page to its server. The cookie goes along by itself; no script can read it.

export async function ask(path, body) {
  const sent = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let answer, text;
  try {
    answer = await fetch(path, body === undefined ? {} : sent);
    text = await answer.text();
  } catch {
    throw new Error("The server can't be reached. What you did is kept in this browser; try again.");
  }
  let said;
  try {
    said = JSON.parse(text);
  } catch {
    said = { error: `${answer.status}: ${text.slice(0, 200)}` };
  }
  if (!answer.ok) throw Object.assign(new Error(said.error), { status: answer.status });
  return said;
}
