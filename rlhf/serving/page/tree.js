// A conversation as a tree: an answer that is written again, edited or compared gets siblings, and one path is shown.

// A name drawn at random; randomUUID is there on secure addresses alone.
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newTree() {
  return { root: node("root", "", {}) };
}

export function node(role, content, facts) {
  return { id: newId(), role, content, children: [], shown: 0, ...facts };
}

// Add a child, which is shown from now on.
export function add(parent, child) {
  parent.children.push(child);
  parent.shown = parent.children.length - 1;
  return child;
}

export function remove(parent, child) {
  parent.children.splice(parent.children.indexOf(child), 1);
  parent.shown = Math.max(0, parent.children.length - 1);
}

export function parentOf(tree, turn) {
  const turns = trail(tree.root, turn) ?? [];
  return turns[turns.length - 2] ?? tree.root;
}

// The turns that are shown, from the first one on.
export function path(tree) {
  const turns = [];
  for (let at = tree.root; at.children.length; at = turns[turns.length - 1]) turns.push(at.children[at.shown]);
  return turns;
}

// Show the previous (-1) or the next (1) sibling.
export function step(parent, by) {
  parent.shown = Math.min(parent.children.length - 1, Math.max(0, parent.shown + by));
}

// The messages up to a turn, it included, as a request has them.
export function messages(tree, upTo, system) {
  const told = system ? [{ role: "system", content: system }] : [];
  const turns = (trail(tree.root, upTo) || []).filter((turn) => turn.content.trim()); // an answer may be empty
  return told.concat(turns.map((turn) => ({ role: turn.role, content: turn.content })));
}

// The turns from the root to one of them, whether they are shown or not.
function trail(from, to) {
  for (const child of from.children) {
    if (child === to) return [child];
    const rest = trail(child, to);
    if (rest) return [child, ...rest];
  }
  return null;
}

// A tree out of its JSON, or null for anything else; an answer that was being written when the page went is cut short.
export function revived(text) {
  const mend = (at) => {
    if (typeof at.content !== "string" || !Array.isArray(at.children)) throw new Error("no tree");
    if (at.state === "writing") at.state = "stopped";
    at.children.forEach(mend);
  };
  try {
    const tree = JSON.parse(text);
    mend(tree.root);
    return tree;
  } catch {
    return null;
  }
}
