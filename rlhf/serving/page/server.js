// What the page asks its server: with the token, and for answers that come piece by piece.

const KEY = "rlhf-token";

export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function setToken(token) {
  sessionStorage.setItem(KEY, token);
}

async function ask(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const token = sessionStorage.getItem(KEY);
  if (token) headers.Authorization = `Bearer ${token}`;
  const sent = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, { ...sent, headers, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "the server can't be reached");
  }
  if (!response.ok) {
    const told = await response.json().catch(() => null);
    throw new Refusal(response.status, told?.error?.message ?? `the server answered ${response.status}`);
  }
  return response;
}

export async function get(path) {
  return (await ask(path)).json();
}

export async function post(path, body) {
  return (await ask(path, body)).json();
}

// Ask for an answer and hand its text over as it grows; returns what is known of it at the end.
export async function stream(request, signal, grown) {
  const response = await ask("v1/chat/completions", { ...request, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const known = { text: "", finish: null, seed: null };
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return known;
      const event = JSON.parse(data);
      if (event.error) throw new Refusal(500, event.error.message);
      known.seed = event.seed ?? known.seed;
      for (const choice of event.choices) {
        known.text += choice.delta?.content ?? "";
        known.finish = choice.finish_reason ?? known.finish;
      }
      grown(known.text);
    }
  }
  throw new Refusal(0, "the answer broke off");
}
