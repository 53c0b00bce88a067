// Elements for texts of models and people: every one of them is put in by textContent, and none is ever markup.

export function make(tag, text, kind) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function textOf(content) {
  const text = make("pre", content, "text");
  text.dir = "auto";
  return text;
}

export function promptOf(messages) {
  return messages.flatMap((turn) => {
    const said = turn.tool_calls ? `${turn.content}\n${JSON.stringify(turn.tool_calls)}` : turn.content;
    return messages.length > 1 || turn.role !== "user" ? [make("div", turn.role, "role"), textOf(said)] : [textOf(said)];
  });
}

// One response: its number, its text, its ratings. tap(number): somebody clicked it; rate(name, place, value).
export function cardOf(response, place, criteria, ratings, tap, rate) {
  const card = make("article", undefined, "card");
  const choose = make("button", undefined, "choose");
  choose.type = "button";
  choose.append(make("span", String(place + 1), "number"), make("span", "", "place"));
  card.append(choose, textOf(response));
  card.addEventListener("click", (event) => {
    if (event.detail > 1 || getSelection().toString()) return; // a double click, or somebody marks text
    tap(place + 1);
  });
  if (criteria.length) {
    const rows = make("div", undefined, "ratings");
    rows.append(...criteria.map((criterion, row) => ratingOf(criterion, row, place, ratings, rate)));
    rows.addEventListener("click", (event) => event.stopPropagation());
    card.append(rows);
  }
  return card;
}

function ratingOf({ name, text, scale }, row, place, ratings, rate) {
  const rating = make("fieldset", undefined, "rating");
  const legend = make("legend", name);
  legend.title = text;
  rating.append(legend);
  scale.forEach((shown, step) => {
    const input = make("input");
    input.type = "radio";
    input.name = `rating-${place}-${row}`;
    input.value = String(step + 1);
    input.checked = ratings[name][place] === step + 1;
    input.addEventListener("change", () => rate(name, place, step + 1));
    const label = make("label");
    label.append(input, make("span", shown));
    rating.append(label);
  });
  return rating;
}

export function flagOf(name, place, toggle) {
  const input = make("input");
  input.type = "checkbox";
  input.addEventListener("change", () => toggle(name));
  const label = make("label");
  label.append(input, make("span", ` ${place + 1} ${name}`));
  return label;
}

export function markRank(card, place, rank, tied) {
  const shown = rank ? `rank ${rank}${tied ? ", tied" : ""}` : "";
  card.classList.toggle("ranked", rank > 0);
  card.querySelector(".place").textContent = shown;
  card.querySelector(".choose").setAttribute("aria-label", `Response ${place + 1}, ${shown || "not ranked"}`);
}

export function criterionOf({ name, text }) {
  const shown = make("p");
  shown.append(make("strong", name), text && `: ${text}`);
  return shown;
}

// ---------------------------------------------------------------- guidelines: a little Markdown

// Headings, lists, code, **bold** and `code`; everything else, links and HTML among it, is shown as it was written.
export function guidelinesOf(markdown) {
  const shown = document.createDocumentFragment();
  const fences = markdown.split(/^```.*$/m);
  fences.forEach((part, place) => {
    if (place % 2) shown.append(textOf(part.replace(/^\n|\n$/g, "")));
    else for (const block of part.split(/\n[ \t]*\n/)) if (block.trim()) shown.append(...blocksOf(block));
  });
  return shown;
}

function blocksOf(block) {
  const blocks = [];
  let open = null; // the paragraph or list that the next line goes on with
  for (const line of block.split("\n").filter((one) => one.trim())) {
    const heading = /^#{1,6}\s+(.*)/.exec(line);
    const point = /^\s*(?:([-*+])|\d+[.)])\s+(.*)/.exec(line);
    if (heading) {
      blocks.push(inline(make(line.startsWith("###") ? "h4" : "h3"), heading[1]));
      open = null;
    } else if (point) {
      const kind = point[1] ? "UL" : "OL";
      if (open?.tagName !== kind) blocks.push((open = make(kind)));
      open.append(inline(make("li"), point[2]));
    } else if (open) {
      const last = open.tagName === "P" ? open : open.lastChild;
      last.append("\n");
      inline(last, line.trim());
    } else blocks.push((open = inline(make("p"), line.trim())));
  }
  return blocks;
}

function inline(element, text) {
  for (const part of text.split(/(\*\*[^*]+\*\*|`[^`]+`)/)) {
    if (/^\*\*.+\*\*$/.test(part)) element.append(make("strong", part.slice(2, -2)));
    else if (/^`.+`$/.test(part)) element.append(make("code", part.slice(1, -1)));
    else element.append(part);
  }
  return element;
}
