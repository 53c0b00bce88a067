// What a person says of answers: thumbs with reasons, a better answer, a vote. Texts are sent with consent alone.

import { post } from "./server.js";
import { element } from "./text.js";
import { messages, newId } from "./tree.js";

const ME = "rlhf-person";

// The pseudonym under which this browser's feedback is kept and can be erased.
export function me() {
  if (!localStorage.getItem(ME)) localStorage.setItem(ME, newId());
  return localStorage.getItem(ME);
}

// The checkbox beside a button that sends something, never ticked beforehand.
export function consent(settings) {
  const box = element("input", { type: "checkbox", class: "agree" });
  const days = settings.retention_days;
  const line = ` Keep this conversation for ${days} ${days === 1 ? "day" : "days"} and use it to train models.`;
  return { box, label: element("label", { class: "consent" }, box, line) };
}

// id: the same for every attempt and change of mind, so that the server keeps the last one alone.
function facts(page, turn, id, kind, agreed) {
  const sent = { id, person: me(), kind, consent: agreed, sampler: turn.sampler };
  if (turn.model) sent.model = turn.model;
  if (Number.isInteger(turn.seed)) sent.seed = turn.seed;
  if (agreed) Object.assign(sent, { conversation: turn.id, messages: messages(page.tree, turn, turn.system) });
  return sent;
}

// Do something while buttons wait: a second click sends nothing.
export async function once(buttons, work) {
  buttons.forEach((button) => { button.disabled = true; });
  await work();
  buttons.forEach((button) => { button.disabled = false; });
}

// The panel under an answer after a thumb: reasons, consent, send.
export function thumbPanel(page, turn, thumb, close) {
  const { box, label } = consent(page.settings);
  const chosen = new Set();
  const tags = page.settings.tags.map((tag) =>
    element("button", { type: "button", "aria-pressed": "false", onclick: (event) => {
      if (!chosen.delete(tag)) chosen.add(tag);
      event.target.setAttribute("aria-pressed", String(chosen.has(tag)));
    } }, tag));
  const send = element("button", { type: "button", class: "main send-thumb", onclick: () => once([send], async () => {
    turn.thumb_id ??= newId();
    const sent = { ...facts(page, turn, turn.thumb_id, "thumb", box.checked), thumb, tags: [...chosen] };
    if (await page.tell(() => post("v1/feedback", sent))) {
      turn.thumb = thumb;
      close();
    }
  }) }, "Send");
  const title = thumb > 0 ? "What is good about it?" : "What is wrong with it?";
  return element("div", { class: "panel" }, element("strong", {}, title), element("div", { class: "tags" }, ...tags),
    label, element("div", { class: "actions" }, send, element("button", { type: "button", onclick: close }, "Cancel")));
}

// The panel in which an answer is changed: the new text becomes a sibling, and is sent with consent.
export function editPanel(page, turn, done, close) {
  const { box, label } = consent(page.settings);
  const text = element("textarea", { rows: "6", "aria-label": "The answer as it should be" });
  text.value = turn.content;
  const id = newId();
  const use = element("button", { type: "button", class: "main use-edit", onclick: () => once([use], async () => {
    if (!text.value.trim()) return;
    const sent = { ...facts(page, turn, id, "edit", true), edit: text.value };
    if (box.checked && !(await page.tell(() => post("v1/feedback", sent)))) return;
    done(text.value);
  }) }, "Use this answer");
  const agree = page.settings.feedback ? label : null;
  return element("div", { class: "panel" }, text, agree,
    element("div", { class: "actions" }, use, element("button", { type: "button", onclick: close }, "Cancel")));
}

// The vote under answers that stand side by side; `best` is the index among `answers`, or null for no difference.
export async function vote(page, question, answers, best, agreed) {
  const stored = answers.map((turn, place) => ({ turn, place })).sort((a, b) => compareText(a.turn.model, b.turn.model));
  question.vote_id ??= newId();
  const sent = {
    ...facts(page, { ...question, model: null, sampler: answers[0].sampler }, question.vote_id, "comparison", agreed),
    responses: stored.map(({ turn }) => (agreed ? turn.content : "")),
    policies: stored.map(({ turn }) => turn.model),
    order: answers.map((turn) => stored.findIndex((kept) => kept.turn === turn)),
    ranks: stored.map(({ place }) => (best === null || best === place ? 1 : 2)),
  };
  if (agreed) sent.messages = messages(page.tree, question, answers[0].system);
  return page.tell(() => post("v1/feedback", sent));
}

function compareText(a, b) {
  return a < b ? -1 : a > b ? 1 : 0;
}
