// The labelling page: what it asks the server, and what keys, mouse and touch do.

import {
  answerOf, drawSubmission, forgetAll, forgetDraft, fresh, groups, judged, keepDraft, missing, ranks, readDraft, rewritten,
  without, written,
} from "./ranking.js";
import { ask } from "./server.js";
import { cardOf, criterionOf, flagOf, guidelinesOf, markRank, promptOf } from "./view.js";

const byId = (id) => document.getElementById(id);
const SECTIONS = { rewrite: "rewriting", comment: "commenting" };

let project = null; // title, guidelines, criteria, flags
let now = null; // the item on the screen, and what has been said about it so far
let busy = false; // a request is under way: keys wait, so that none reaches an item that nobody has seen
let choosing = false; // the next number is a flag's
let renewing = null; // the timer by which the server hears that somebody is still at work
let sure = ""; // the key that asked to be pressed again

// ---------------------------------------------------------------- one item after the other

async function work(doing) {
  if (busy) return;
  hold(true);
  try {
    await doing();
  } catch (problem) {
    if (problem.status === 401) away("Please open your invitation link in this browser.", problem.message);
    else if (now) tell(problem.message);
    else away(problem.message, "", true);
  } finally {
    hold(false);
  }
}

// While a request is under way nothing that was said changes: what came after it was sent would be lost.
function hold(still) {
  busy = still;
  document.body.setAttribute("aria-busy", String(still));
  for (const name of Object.keys(SECTIONS)) byId(name).readOnly = still;
}

async function begin() {
  const token = new URLSearchParams(location.hash.slice(1)).get("invite");
  if (token) {
    history.replaceState(null, "", location.pathname + location.search); // out of the address bar, bookmarks, pictures
    await ask("api/enter", { token });
  }
  now = null;
  project = await ask("api/project");
  document.title = project.title;
  byId("title").textContent = project.title;
  const guided = Boolean(project.guidelines) || project.criteria.some(({ text }) => text);
  byId("guidelines").replaceChildren(guidelinesOf(project.guidelines), ...project.criteria.map(criterionOf));
  byId("beside").hidden = !guided;
  byId("sides").classList.toggle("guided", guided);
  byId("guide").open = matchMedia("(min-width: 1000px)").matches;
  byId("flags").replaceChildren(...project.flags.map((name, place) => flagOf(name, place, toggleFlag)));
  byId("flag").hidden = !project.flags.length;
  await next();
}

async function next() {
  const said = await ask("api/next", {});
  showProgress(said.progress);
  if (said.tasks.length) return show(said.tasks[0], false);
  if (said.waiting) return away("Nothing to do right now: others are at work on what is left.", "", true);
  away("All done, thank you!", "There is nothing left for you. You can close this page.", true);
}

async function submit() {
  const { item } = now;
  const unranked = !now.tokens.length && (now.flags.length || rewritten(now, item) !== null);
  const problem = unranked ? "" : missing(now, project, item.candidates.length);
  if (problem) return tell(problem);
  if (unranked && !pressedTwice("Enter", "Nothing is ranked: press Enter again to submit the rest alone.")) return;
  now.submission ??= drawSubmission(); // the same for every attempt, until something is changed
  keep();
  try {
    await ask("api/judgments", answerOf(now, item, project, elapsed()));
  } catch (problem) {
    if (problem.status !== 409) throw problem;
    await done(item); // it took too long, and the item went to others: nothing can be done about that here
    byId(now ? "message" : "news_more").textContent = problem.message;
    return;
  }
  await done(item);
}

async function skip() {
  const { item } = now;
  const begun = now.tokens.length || rewritten(now, item) !== null;
  if (begun && !pressedTwice("s", "Press S again to skip this item; what you did here will be dropped.")) return;
  const reason = [...now.flags, now.comment.trim()].filter(Boolean).join("; ");
  await ask("api/skip", { assignment: item.assignment, reason });
  await done(item);
}

function pressedTwice(key, text) {
  if (sure === key) return true;
  sure = key;
  tell(text);
  return false;
}

async function back() {
  const said = await ask("api/back", { before: now?.earlier ? now.item.assignment : null });
  if (said.task) show(said.task, true);
  else if (now) tell("You have judged no earlier item.");
  else byId("news_more").textContent = "You have judged no item.";
}

async function done(item) {
  forgetDraft(item);
  now = null;
  await next();
}

async function leaveBrowser() {
  await ask("api/leave", {});
  forgetAll();
  byId("keys").close();
  away("You have left. Your invitation link lets you in again.");
}

// ---------------------------------------------------------------- what an annotator does

function append(number) {
  if (number > now.item.candidates.length) return tell(`There is no response ${number}.`);
  if (now.tokens.includes(number)) return tell(`${number} is ranked already; Backspace undoes.`);
  now.tokens.push(number);
  changed();
}

function tie() {
  if (!Number.isInteger(now.tokens.at(-1))) return tell("= stands between two numbers, as in 2 = 3.");
  if (!ranks(now.tokens, now.item.candidates.length).includes(0)) return tell("All are ranked; Backspace undoes.");
  now.tokens.push("=");
  changed();
}

function undo() {
  now.tokens.pop();
  changed();
}

function tap(number) {
  if (busy || !now) return;
  if (!now.tokens.includes(number)) return append(number);
  now.tokens = without(now.tokens, number);
  changed();
}

function rate(name, place, value) {
  if (!now) return; // the item has just left
  now.ratings[name][place] = value;
  changed();
}

function toggleFlag(name) {
  if (!now) return;
  now.flags = project.flags.filter((flag) => (flag === name) !== now.flags.includes(flag));
  changed();
}

function chooseFlag() {
  choosing = project.flags.length > 0 && !choosing;
  paint();
  if (choosing) byId("flagging").scrollIntoView({ block: "center" });
}

function write(name) {
  now.opened.add(name);
  if (name === "rewrite" && !now.rewrite) {
    const best = groups(now.tokens)[0]?.[0] ?? 1;
    const { id, text } = now.item.candidates[best - 1];
    now.rewrite = byId("rewrite").value = text;
    now.rewrite_of = id;
  }
  paint();
  byId(name).focus();
  byId(name).scrollIntoView({ block: "center" });
}

function leave(field) {
  if (!field.value.trim() || (field.id === "rewrite" && rewritten(now, now.item) === null)) {
    now[field.id] = field.value = "";
    now.opened.delete(field.id);
  }
  field.blur();
  changed();
}

function elapsed() {
  const running = now.since === null ? 0 : (performance.now() - now.since) / 1000;
  return Math.round((now.seconds + running) * 10) / 10;
}

function clock() {
  if (!now) return;
  now.seconds = elapsed();
  now.since = document.hidden ? null : performance.now(); // time counts while the page is seen
  keep();
}

function renew() {
  if (now && !now.earlier && !document.hidden) ask("api/renew", { assignment: now.item.assignment }).catch(() => {});
}

function keep() {
  if (!keepDraft(now.item, { ...now, seconds: elapsed() }))
    tell("This browser keeps no drafts: a reload loses what is not submitted.");
}

// ---------------------------------------------------------------- what is shown

function tell(text) {
  byId("message").textContent = text;
}

function away(news, more = "", again = false) {
  now = null;
  byId("work").hidden = true;
  byId("away").hidden = false;
  byId("news").textContent = news;
  byId("news_more").textContent = more;
  byId("look_again").hidden = !again;
  byId("back_away").hidden = !again || !project;
}

function showProgress({ done, left }) {
  byId("progress").hidden = false;
  byId("bar").max = Math.max(1, done + left);
  byId("bar").value = done;
  byId("count").textContent = `${done} done, ${left} left`;
}

// earlier: one that was judged before, now to be edited
function show(item, earlier) {
  const start = readDraft(item, project) ?? (item.answer ? judged(item, project) : fresh(item, project));
  now = { ...start, item, earlier, since: document.hidden ? null : performance.now(), opened: new Set() };
  clearInterval(renewing);
  renewing = setInterval(renew, 1000 * item.renew_seconds);
  choosing = false;
  byId("away").hidden = true;
  byId("work").hidden = false;
  byId("earlier").hidden = !earlier;
  byId("prompt").replaceChildren(...promptOf(item.prompt));
  const cards = item.candidates.map(({ text }, place) => cardOf(text, place, project.criteria, now.ratings, tap, rate));
  byId("responses").replaceChildren(...cards);
  for (const name of Object.keys(SECTIONS)) byId(name).value = now[name];
  tell("");
  paint();
  scrollTo(0, 0);
  byId("item").focus({ preventScroll: true });
}

function changed() {
  tell("");
  now.submission = null;
  keep();
  paint();
}

function paint() {
  sure = "";
  const sorted = groups(now.tokens);
  const single = now.item.candidates.length === 1; // a conversation under review
  const most = "Best first: press or tap the number of the best response.";
  byId("ranking").textContent = written(now.tokens) || (single ? "Press 1 or tap the response, then rate it." : most);
  ranks(now.tokens, now.item.candidates.length).forEach((rank, place) => {
    markRank(byId("responses").children[place], place, rank, rank > 0 && sorted[rank - 1].length > 1);
  });
  for (const [name, section] of Object.entries(SECTIONS)) byId(section).hidden = !(now.opened.has(name) || now[name]);
  byId("edit").setAttribute("aria-expanded", String(!byId("rewriting").hidden));
  byId("note").setAttribute("aria-expanded", String(!byId("commenting").hidden));
  byId("flagging").hidden = !(choosing || now.flags.length);
  byId("flag").setAttribute("aria-expanded", String(choosing));
  byId("flags").querySelectorAll("input").forEach((box, place) => {
    box.checked = now.flags.includes(project.flags[place]);
  });
}

// ---------------------------------------------------------------- keys, mouse, touch

const ACTIONS = {
  "=": tie,
  Backspace: undo,
  Enter: () => work(submit),
  s: () => work(skip),
  f: chooseFlag,
  e: () => write("rewrite"),
  c: () => write("comment"),
  b: () => work(back),
};
const BUTTONS = { tie: "=", undo: "Backspace", submit: "Enter", skip: "s", flag: "f", edit: "e", note: "c", back: "b" };

function help() {
  const keys = byId("keys");
  if (keys.open) keys.close();
  else keys.showModal();
}

// The number of a key: also where digits need Shift, as on French keyboards.
function numberOf(event) {
  const found = /^[1-9]$/.exec(event.key) ?? /(?<=^Digit)[1-9]$/.exec(event.code);
  return found ? Number(found[0]) : 0;
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const field = event.target.closest("textarea");
  if (field) {
    if (key === "Escape" && now) leave(field);
    return;
  }
  const number = key in ACTIONS || key === "?" ? 0 : numberOf(event);
  const pressing = event.target.closest("button, summary") && (key === "Enter" || key === " "); // the browser does it
  if (pressing || !(number || key in ACTIONS || key === "?" || key === "Escape")) return;
  if (key === "?") event.preventDefault();
  if (key === "?") return event.repeat || help();
  if (byId("keys").open || busy) return;
  if (!now && key === "b" && !byId("back_away").hidden) return work(back);
  if (!now) return;
  event.preventDefault();
  if (event.repeat && key !== "Backspace") return;
  if (key !== sure) sure = "";
  if (key === "Escape") choosing = false;
  if (key === "Escape") return changed();
  if (!number) return ACTIONS[key]();
  if (!choosing) return append(number);
  choosing = false;
  if (number <= project.flags.length) toggleFlag(project.flags[number - 1]);
  else changed();
}

document.addEventListener("keydown", pressed);
document.addEventListener("click", (event) => busy && event.target.closest(".rating, #flags") && event.preventDefault(), true);
document.addEventListener("click", (event) => {
  const button = event.target.closest("button, summary");
  if (button && event.detail) button.blur(); // a click leaves the keys to the page
});
document.addEventListener("visibilitychange", clock);
addEventListener("pagehide", clock);
document.addEventListener("visibilitychange", renew);
addEventListener("hashchange", () => work(begin));
for (const [id, key] of Object.entries(BUTTONS)) byId(id).addEventListener("click", () => busy || !now || ACTIONS[key]());
for (const [name] of Object.entries(SECTIONS)) {
  byId(name).addEventListener("input", () => {
    if (!now) return;
    now[name] = byId(name).value;
    now.submission = null;
    keep();
  });
}
byId("help").addEventListener("click", help);
byId("close_keys").addEventListener("click", help);
byId("look_again").addEventListener("click", () => work(next));
byId("back_away").addEventListener("click", () => work(back));
byId("leave_earlier").addEventListener("click", () => work(() => done(now.item)));
byId("leave").addEventListener("click", () => work(leaveBrowser));
work(begin);
