// Text of people and models as page elements: paragraphs and blocks of code. Never markup: only textContent is set.

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onclick") made.addEventListener("click", value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, String(value));
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

// Fill an element with a text.
export function show(target, text) {
  const parts = [];
  const lines = text.split("\n");
  let prose = [], code = null;
  const endProse = () => {
    const written = prose.join("\n").replace(/^\n+|\s+$/g, "");
    if (written) for (const paragraph of written.split(/\n{2,}/)) parts.push(element("p", { dir: "auto" }, paragraph));
    prose = [];
  };
  const endCode = () => {
    parts.push(element("pre", { class: "code", tabindex: "0" }, element("code", {}, code.join("\n"))));
    code = null;
  };
  for (const line of lines) {
    if (/^\s{0,3}```/.test(line)) {
      if (code === null) { endProse(); code = []; } else endCode();
    } else (code === null ? prose : code).push(line);
  }
  if (code !== null) endCode(); // the fence is not closed yet
  endProse();
  target.replaceChildren(...parts);
}
