// The tree of markdown.js as elements. Text goes in as text, by textContent alone.

import { parse } from "./markdown.js";

export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

// Shows `text` in `target`. Blocks that are as they were stay: a selection in them does too.
export function showMarkdown(target, text) {
  const blocks = parse(text);
  const old = target.shown ?? [];
  let same = 0;
  while (same < blocks.length && same < old.length && old[same] === blocks[same].raw) same += 1;
  while (target.children.length > same) target.lastChild.remove();
  for (const block of blocks.slice(same)) target.append(blockElement(block));
  target.shown = blocks.map((block) => block.raw);
}

function blockElement(block) {
  switch (block.type) {
    case "heading":
      return element(`h${Math.min(block.level + 2, 6)}`, {}, ...block.inlines.map(inlineElement));
    case "code":
      return codeElement(block);
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", {}, ...block.blocks.map(blockElement));
    case "list":
      return listElement(block);
    case "table":
      return tableElement(block);
    default:
      return element("p", {}, ...block.inlines.map(inlineElement));
  }
}

function codeElement({ language, code }) {
  const made = element("pre", { tabIndex: 0 }, element("code", { textContent: code }));
  if (language) made.dataset.language = language;
  return made;
}

function listElement({ ordered, start, items }) {
  const made = element(ordered ? "ol" : "ul");
  if (ordered) made.start = start;
  for (const blocks of items) {
    // A short item is its text, with no paragraph around it.
    const [first, ...rest] = blocks;
    const inside = first?.type === "paragraph" ? first.inlines.map(inlineElement) : first ? [blockElement(first)] : [];
    made.append(element("li", {}, ...inside, ...rest.map(blockElement)));
  }
  return made;
}

function tableElement({ head, rows }) {
  const row = (name, cells) =>
    element("tr", {}, ...cells.map((cell) => element(name, {}, ...cell.map(inlineElement))));
  const table = element("table", {},
    element("thead", {}, row("th", head)),
    element("tbody", {}, ...rows.map((cells) => row("td", cells))));
  return element("div", { className: "table", tabIndex: 0 }, table);
}

function inlineElement(node) {
  switch (node.type) {
    case "text":
      return document.createTextNode(node.text);
    case "break":
      return element("br");
    case "code":
      return element("code", { textContent: node.text });
    case "link":
      return element("a", {
        href: node.href, rel: "noopener noreferrer nofollow", target: "_blank", textContent: node.text,
      });
    default:
      return element(node.type, {}, ...node.inlines.map(inlineElement));
  }
}
