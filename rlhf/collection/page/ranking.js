// What an annotator has said about an item, and the drafts of it. Nothing here touches the page.

const DRAFT = "rlhf-label:";
const FIELDS = ["tokens", "ratings", "rewrite", "rewrite_of", "flags", "comment", "seconds", "submission"];

// A ranking is what was pressed: numbers, and "=" before one that ties with the number before it.
export function groups(tokens) {
  const made = [];
  let tied = false;
  for (const token of tokens) {
    if (token === "=") {
      tied = true;
      continue;
    }
    if (tied) made.at(-1).push(token);
    else made.push([token]);
    tied = false;
  }
  return made;
}

export function tokensOf(sorted) {
  return sorted.flatMap((group) => group.flatMap((number, place) => (place ? ["=", number] : [number])));
}

export function without(tokens, number) {
  const rest = groups(tokens).map((group) => group.filter((other) => other !== number));
  return tokensOf(rest.filter((group) => group.length));
}

export function written(tokens) {
  const dangling = tokens.at(-1) === "=" ? " = ..." : "";
  return groups(tokens).map((group) => group.join(" = ")).join(" > ") + dangling;
}

// The rank of each response, in the order shown: 1 is best, equal ranks are a tie, 0: not ranked.
export function ranks(tokens, count) {
  const sorted = groups(tokens);
  return Array.from({ length: count }, (_, place) => 1 + sorted.findIndex((group) => group.includes(place + 1)));
}

// Why this can't be submitted, or "".
export function missing(said, project, count) {
  const numbers = Array.from({ length: count }, (_, place) => place + 1);
  const left = numbers.filter((number) => !said.tokens.includes(number));
  if (said.tokens.at(-1) === "=") return "After = comes the number of the response that ties; Backspace undoes the =.";
  if (left.length) return `Not ranked yet: ${left.join(", ")}.`;
  for (const { name } of project.criteria) {
    const unrated = numbers.filter((number) => said.ratings[name][number - 1] === null);
    if (unrated.length) return `No ${name} yet for: ${unrated.join(", ")}.`;
  }
  return "";
}

// The rewrite; null where there is none, or one that equals a response.
export function rewritten({ rewrite }, item) {
  const own = rewrite.trim() !== "" && item.candidates.every(({ text }) => text !== rewrite);
  return own ? rewrite : null;
}

export function drawSubmission() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// What is sent: ranks and ratings by the candidates' ids; no ranks where nothing is ranked.
export function answerOf(said, item, project, seconds) {
  const { tokens, ratings, flags, comment, submission } = said;
  const places = ranks(tokens, item.candidates.length);
  const rated = item.candidates.map(({ id }, place) => {
    const given = project.criteria.map(({ name }) => [name, ratings[name][place]]);
    return [id, Object.fromEntries(given.filter(([, value]) => value !== null))];
  });
  const rewrite = rewritten(said, item);
  return {
    assignment: item.assignment,
    submission,
    ranks: tokens.length ? Object.fromEntries(item.candidates.map(({ id }, place) => [id, places[place]])) : null,
    ratings: Object.fromEntries(rated.filter(([, given]) => Object.keys(given).length)),
    rewrite,
    rewrite_of: rewrite === null ? null : said.rewrite_of,
    flags,
    comment: comment.trim(),
    seconds,
    guideline: project.guideline,
  };
}

export function fresh(item, project) {
  const nothing = () => item.candidates.map(() => null);
  const ratings = Object.fromEntries(project.criteria.map(({ name }) => [name, nothing()]));
  return { tokens: [], ratings, rewrite: "", rewrite_of: null, flags: [], comment: "", seconds: 0, submission: null };
}

// An earlier judgment, to be edited.
export function judged(item, project) {
  const { ranks: given, ratings, rewrite, rewrite_of, flags, comment } = item.answer;
  const placed = given ? item.candidates.map(({ id }) => given[id]) : [];
  const levels = [...new Set(placed)].sort((one, other) => one - other);
  const sorted = levels.map((rank) => placed.flatMap((other, place) => (other === rank ? [place + 1] : [])));
  const start = fresh(item, project);
  for (const [name, row] of Object.entries(start.ratings))
    item.candidates.forEach(({ id }, place) => (row[place] = ratings[id]?.[name] ?? null));
  const known = flags.filter((flag) => project.flags.includes(flag));
  return { ...start, tokens: tokensOf(sorted), rewrite: rewrite ?? "", rewrite_of, flags: known, comment };
}

// ---------------------------------------------------------------- drafts

function isSound(kept, item, project) {
  const numbers = kept.tokens.filter((token) => token !== "=");
  return (
    new Set(numbers).size === numbers.length &&
    numbers.every((number) => Number.isInteger(number) && number >= 1 && number <= item.candidates.length) &&
    kept.tokens.every((token, place) => token !== "=" || Number.isInteger(kept.tokens[place - 1])) &&
    project.criteria.every(({ name }) => kept.ratings[name].length === item.candidates.length) &&
    kept.flags.every((flag) => project.flags.includes(flag)) &&
    [kept.rewrite, kept.comment].every((text) => typeof text === "string") &&
    Number.isFinite(kept.seconds) &&
    FIELDS.every((name) => name in kept)
  );
}

export function readDraft(item, project) {
  try {
    const kept = JSON.parse(localStorage.getItem(DRAFT + item.draft));
    return isSound(kept, item, project) ? kept : null;
  } catch {
    return null; // there is none, or one of another version
  }
}

// Returns false where the browser keeps nothing.
export function keepDraft(item, said) {
  const draft = Object.fromEntries(FIELDS.map((name) => [name, said[name]]));
  try {
    localStorage.setItem(DRAFT + item.draft, JSON.stringify(draft));
    return true;
  } catch {
    return false;
  }
}

export function forgetDraft(item) {
  try {
    localStorage.removeItem(DRAFT + item.draft);
  } catch {
    // nothing is kept here
  }
}

export function forgetAll() {
  try {
    for (const key of Object.keys(localStorage)) if (key.startsWith(DRAFT)) localStorage.removeItem(key);
  } catch {
    // nothing is kept here
  }
}
