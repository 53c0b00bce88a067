// The chat page: questions, answers as they are written, siblings, comparisons.

import { consent, editPanel, me, once, thumbPanel, vote } from "./feedback.js";
import { get, Refusal, setToken, stream } from "./server.js";
import { element, show } from "./text.js";
import { add, messages, newTree, node, parentOf, path, remove, revived, step } from "./tree.js";

const KEPT = "rlhf-chat";
const $ = (id) => document.getElementById(id);
const page = { tree: newTree(), settings: null, writing: null, tell };
const panels = { edit: new WeakMap(), thumb: new WeakMap() }; // of turns; they stay open when all is drawn anew

// ---------------------------------------------------------------- start

async function start() {
  try {
    page.settings = await get("page/settings");
  } catch (error) {
    $("entry").hidden = error.status !== 401;
    $("asking").hidden = true;
    say(error.status === 401 && !page.entered ? "" : error.message);
    return;
  }
  const settings = page.settings;
  $("entry").hidden = true;
  $("asking").hidden = false;
  $("model").replaceChildren(...settings.models.map((name) => element("option", { value: name }, name)));
  $("compare_choice").hidden = false;
  $("max_tokens").value = $("max_tokens").max = settings.max_tokens;
  $("system").value = settings.system_prompt ?? "";
  $("about_me").hidden = !settings.feedback;
  if (settings.feedback)
    $("about_me").textContent = `Your feedback is kept under the name ${me()}; who runs this server can erase it by that name.`;
  $("logged").textContent = `Conversations on this server are kept for ${settings.retention_days} days, without mail addresses, phone and card numbers.`;
  $("logged").hidden = !settings.log;
  page.tree = revived(sessionStorage.getItem(KEPT)) ?? page.tree;
  draw();
  $("question").focus();
}

function say(line) {
  $("message").textContent = line;
}

// Do something with the server; its refusal becomes a line, and false.
async function tell(work) {
  say("");
  try {
    await work();
    return true;
  } catch (error) {
    say(error.message);
    return false;
  }
}

// ---------------------------------------------------------------- asking

function sampler() {
  const read = (id, least, most, otherwise) => {
    const value = $(id).value === "" ? otherwise : Number($(id).value);
    if (!(value >= least && value <= most)) throw new Refusal(0, `${id}: choose a number from ${least} to ${most}`);
    return value;
  };
  const most = page.settings.max_tokens;
  return {
    temperature: read("temperature", 0, 2, 1), top_p: read("top_p", 0.001, 1, 1),
    max_tokens: Math.round(read("max_tokens", 1, most, most)),
  };
}

function newAnswer(parent, model, settings, extra = {}) {
  const given = Number.parseInt($("seed").value, 10);
  const seed = Number.isSafeInteger(given) ? given + parent.children.length : null;
  const system = $("system").value.trim() || null;
  return add(parent, node("assistant", "", { model, seed, sampler: settings, system, state: "writing", ...extra }));
}

// Write answers that stand side by side, or a single one, until all have ended or are stopped.
async function write(question, answers) {
  const controller = new AbortController();
  page.writing = controller;
  draw(true);
  await Promise.all(answers.map((turn) => writeOne(question, turn, controller.signal)));
  page.writing = null;
  if (answers.some((turn) => !turn.content && turn.state !== "done")) drop(question, answers);
  draw(true);
}

async function writeOne(question, turn, signal) {
  const asked = { model: turn.model, messages: messages(page.tree, question, turn.system), ...turn.sampler };
  if (turn.seed !== null) asked.seed = turn.seed;
  let waiting = false;
  try {
    const known = await stream(asked, signal, (text) => {
      turn.content = text;
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        const target = document.getElementById(`text-${turn.id}`);
        const atEnd = window.innerHeight + window.scrollY > document.body.scrollHeight - 80;
        if (target) show(target, turn.content);
        if (atEnd) window.scrollTo(0, document.body.scrollHeight);
      });
    });
    Object.assign(turn, { state: "done", finish: known.finish, seed: known.seed });
  } catch (error) {
    turn.state = error.name === "AbortError" ? "stopped" : "failed";
    if (turn.state === "failed") say(error.message);
  }
}

async function ask(text) {
  const turns = path(page.tree);
  const question = add(turns[turns.length - 1] ?? page.tree.root, node("user", text, {}));
  const random = Math.random() < page.settings.compare_share;
  await ($("compare").checked || random ? compare(question) : answer(question, $("model").value));
}

async function answer(question, model) {
  await write(question, [newAnswer(question, model, sampler())]);
}

// Several policies, drawn and shown in an order drawn anew; of a single policy two answers.
async function compare(question) {
  const names = shuffled(page.settings.models).slice(0, $("compare").checked ? 4 : 2);
  const settings = sampler();
  question.comparing = "open";
  const compared = names.length > 1 ? names : [names[0], names[0]];
  await write(question, compared.map((name) => newAnswer(question, name, settings, { compared: true })));
}

function shuffled(names) {
  const mixed = [...names];
  for (let last = mixed.length - 1; last > 0; last--) {
    const other = Math.floor(Math.random() * (last + 1));
    [mixed[last], mixed[other]] = [mixed[other], mixed[last]];
  }
  return mixed;
}

// Answers of which nothing came leave nothing behind: a comparison that lacks one becomes a plain answer, and a question
// without any is given back.
function drop(question, answers) {
  const empty = answers.filter((turn) => !turn.content && turn.state !== "done");
  empty.forEach((turn) => remove(question, turn));
  if (question.children.length === 0) {
    remove(parentOf(page.tree, question), question);
    if (!$("question").value) $("question").value = question.content;
  }
  if (question.comparing === "open") {
    question.comparing = "given up";
    answers.forEach((turn) => { turn.voted = true; });
  }
}

// ---------------------------------------------------------------- drawing

function draw(follow = false) {
  const busy = page.writing !== null;
  const turns = path(page.tree);
  const open = turns.some((turn) => turn.comparing === "open");
  let parent = page.tree.root;
  const drawn = [];
  for (const turn of turns) {
    if (turn.role === "user") drawn.push(drawUser(turn));
    else if (parent.comparing === "open") drawn.push(drawComparison(parent));
    else drawn.push(drawAnswer(turn, parent, busy));
    parent = turn;
  }
  const active = document.activeElement;
  $("turns").replaceChildren(...drawn);
  if (active?.isConnected) active.focus({ preventScroll: true });
  $("turns").setAttribute("aria-busy", String(busy));
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("send").disabled = open;
  $("fresh").disabled = busy;
  if (open && !busy) say("Which answer is better? Then it goes on.");
  sessionStorage.setItem(KEPT, JSON.stringify(page.tree));
  if (follow) window.scrollTo(0, document.body.scrollHeight);
}

function drawUser(turn) {
  const text = element("div", { class: "text" });
  show(text, turn.content);
  return element("article", { class: "turn user" }, text);
}

function drawText(turn) {
  const text = element("div", { class: `text ${turn.state === "writing" ? "writing" : ""}`, id: `text-${turn.id}` });
  show(text, turn.content);
  return text;
}

function ending(turn) {
  if (turn.state === "stopped") return "stopped";
  if (turn.state === "failed") return "broke off";
  return turn.finish === "length" ? "cut at the most tokens" : "";
}

function drawAnswer(turn, parent, busy) {
  const card = element("article", { class: "turn answer" });
  const who = element("div", { class: "who" }, element("span", {}, turn.model ?? "edited"));
  const end = ending(turn);
  if (end) who.append(element("span", {}, end));
  if (Number.isInteger(turn.seed)) who.append(element("span", {}, `seed ${turn.seed}`));
  card.append(who, drawText(turn));
  if (turn.state === "writing") return card;

  const actions = element("div", { class: "actions" });
  const button = (label, name, action, attributes = {}) =>
    actions.append(element("button", { type: "button", class: name, disabled: busy, onclick: action, ...attributes }, label));
  if (parent.children.length > 1) {
    const move = (by) => () => { step(parent, by); draw(); };
    button("‹", "previous", move(-1), { "aria-label": "Previous answer", disabled: busy || parent.shown === 0 });
    actions.append(element("span", { class: "place" }, `${parent.shown + 1} / ${parent.children.length}`));
    const last = parent.shown === parent.children.length - 1;
    button("›", "next", move(1), { "aria-label": "Next answer", disabled: busy || last });
  }
  button("Again", "again", () => tell(() => answer(parent, turn.model ?? $("model").value)));
  const close = (kind) => { panels[kind].get(turn)?.remove(); panels[kind].delete(turn); draw(); };
  const open = (kind, made) => {
    panels[kind].get(turn)?.remove();
    panels[kind].set(turn, made);
    card.append(made);
    made.querySelector("textarea, button")?.focus();
  };
  const edited = (text) => {
    add(parent, node("assistant", text, { model: null, sampler: {}, system: turn.system, state: "done" }));
    close("edit");
  };
  button("Edit", "edit", () => open("edit", panels.edit.get(turn) ?? editPanel(page, turn, edited, () => close("edit"))));
  if (page.settings.feedback && turn.model && turn.content) {
    for (const [label, thumb] of [["Good", 1], ["Bad", -1]])
      button(label, thumb > 0 ? "good" : "bad", () => open("thumb", thumbPanel(page, turn, thumb, () => close("thumb"))), { "aria-pressed": String(turn.thumb === thumb) });
  }
  card.append(actions, ...Object.values(panels).map((open) => open.get(turn)).filter(Boolean));
  return card;
}

function drawComparison(question) {
  const answers = question.children.filter((turn) => turn.compared && !turn.voted);
  const letters = "ABCDEFGHI";
  const writing = answers.some((turn) => turn.state === "writing");
  const sides = answers.map((turn, place) => element("article", { class: "answer" },
    element("div", { class: "who" }, element("strong", {}, `Answer ${letters[place]}`), element("span", {}, ending(turn))),
    drawText(turn)));
  const { box, label } = consent(page.settings);
  const choose = async (best) => {
    if (page.settings.feedback && !(await vote(page, question, answers, best, box.checked))) return;
    question.comparing = "voted";
    answers.forEach((turn) => { turn.voted = true; });
    question.shown = question.children.indexOf(answers[best ?? 0]);
    say("");
    draw();
  };
  const buttons = answers.map((turn, place) => element("button",
    { type: "button", class: "main better", disabled: writing, onclick: () => once(buttons, () => choose(place)) }, `${letters[place]} is better`));
  buttons.push(element("button", { type: "button", class: "same", disabled: writing, onclick: () => once(buttons, () => choose(null)) }, "No difference"));
  return element("section", { class: "turn" }, element("div", { class: "sides" }, ...sides),
    page.settings.feedback ? label : null, element("div", { class: "actions" }, ...buttons));
}

// ---------------------------------------------------------------- wiring

$("asking").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("question").value.trim();
  if (!text || page.writing || $("send").disabled) return;
  tell(() => {
    sampler(); // a wrong number is told before anything is asked
    $("question").value = "";
    return ask(text);
  });
});
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("asking").requestSubmit();
});
$("stop").addEventListener("click", () => page.writing?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") page.writing?.abort();
});
$("fresh").addEventListener("click", () => {
  page.tree = newTree();
  say("");
  draw();
  $("question").focus();
});
$("entry").addEventListener("submit", (event) => {
  event.preventDefault();
  setToken($("token").value.trim());
  page.entered = true;
  $("token").value = "";
  start();
});

start();
