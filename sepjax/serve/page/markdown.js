// Markdown to a tree of plain objects. No browser is needed here, and no HTML is made: render.js makes elements.
//
//   blocks   {type: "paragraph" | "heading" | "code" | "list" | "quote" | "rule" | "table", raw, ...}
//   inlines  {type: "text" | "code" | "strong" | "em" | "del" | "link" | "break", ...}
//
// A part of what people write in chats; what is not understood stays as it was written. HTML is text. A text that comes
// in pieces is read again and again, and models write anything: every loop here is linear in the text, or nearly so.

const DEEPEST = 6; // quotes and lists within each other
const MOST_OPEN = 16; // marks of emphasis of one kind that wait for their end; older ones have waited in vain
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t](.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:( +)(.*)|)$/;
const QUOTE = /^ {0,3}>[ ]?/;
const TABLE_RULE = /^\|?(?:[ \t]*:?-+:?[ \t]*\|)*[ \t]*:?-*:?$/;

export function parse(text, depth = 0) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [block, end] = readBlock(lines, at, depth);
    block.raw = lines.slice(at, end).join("\n");
    blocks.push(block);
    at = end;
  }
  return blocks;
}

function readBlock(lines, at, depth) {
  const fence = FENCE.exec(lines[at]);
  if (fence) return readFence(lines, at, fence);
  const heading = HEADING.exec(lines[at]);
  if (heading) return [{ type: "heading", level: heading[1].length, inlines: inline(headline(heading[2] ?? "")) }, at + 1];
  if (RULE.test(lines[at])) return [{ type: "rule" }, at + 1];
  if (depth < DEEPEST && QUOTE.test(lines[at])) return readQuote(lines, at, depth);
  if (depth < DEEPEST && ITEM.test(lines[at])) return readList(lines, at, depth);
  if (isTable(lines, at)) return readTable(lines, at);
  return readParagraph(lines, at, depth);
}

// A heading's text: hashes at its end belong to its mark.
function headline(text) {
  const kept = text.trim();
  let end = kept.length;
  while (kept[end - 1] === "#") end -= 1;
  return end === 0 ? "" : /\s/.test(kept[end - 1]) ? kept.slice(0, end).trim() : kept;
}

function readFence(lines, at, [, mark, language]) {
  const closes = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}\\s*$`);
  let end = at + 1;
  while (end < lines.length && !closes.test(lines[end])) end += 1;
  const code = lines.slice(at + 1, end).join("\n");
  return [{ type: "code", language: language.trim().split(/\s/)[0], code }, Math.min(end + 1, lines.length)];
}

function readQuote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end += 1;
  const inside = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [{ type: "quote", blocks: parse(inside.join("\n"), depth + 1) }, end];
}

// An item is its first line behind the mark and all that is indented as far; blank lines may lie between.
function readList(lines, at, depth) {
  const [, indent, mark] = ITEM.exec(lines[at]);
  const kind = mark.slice(-1);
  const items = [];
  let end = at;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    const isNext = item && item[2].slice(-1) === kind && item[1].length <= indent.length + 1 && !RULE.test(lines[end]);
    if (!isNext) break;
    const inside = [item[4] ?? ""];
    const depthOfText = item[1].length + item[2].length + 1;
    end += 1;
    while (end < lines.length) {
      const line = lines[end];
      if (line.trim() && leading(line) < Math.min(depthOfText, item[1].length + 2)) break;
      inside.push(line.slice(Math.min(leading(line), depthOfText)));
      end += 1;
    }
    items.push(parse(inside.join("\n"), depth + 1));
  }
  const first = Number.parseInt(mark, 10);
  return [{ type: "list", ordered: !Number.isNaN(first), start: first || 1, items }, end];
}

function isTable(lines, at) {
  const [head, rule] = [lines[at], lines[at + 1]];
  return rule !== undefined && head.includes("|") && rule.includes("-") && TABLE_RULE.test(rule.trim())
    && cells(head).length === cells(rule).length;
}

function readTable(lines, at) {
  const width = cells(lines[at]).length;
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end += 1;
  const row = (line) => {
    const found = cells(line);
    return Array.from({ length: width }, (_, i) => inline(found[i] ?? ""));
  };
  return [{ type: "table", head: row(lines[at]), rows: lines.slice(at + 2, end).map(row) }, end];
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

function readParagraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !begins(lines, end, depth)) end += 1;
  return [{ type: "paragraph", inlines: inline(lines.slice(at, end).map((line) => line.trimStart()).join("\n")) }, end];
}

function begins(lines, at, depth) {
  const line = lines[at];
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line)
    || (depth < DEEPEST && (QUOTE.test(line) || ITEM.test(line)));
}

const leading = (line) => line.length - line.trimStart().length;

// -- inside a block ------------------------------------------------------------------------------------------------

// Few spaces at a time: \s* beside \s* would take n^2 steps for n spaces.
const LINK = /!?\[((?:[^[\]\\\n]|\\.)*)\]\(\s{0,16}([^\s()\\]*(?:\([^\s()\\]*\)[^\s()\\]*)*)(?:\s{1,16}"[^"\n]*")?\s{0,16}\)/y;
const BARE = /https?:\/\/[^\s<>"'`*\]|\\]+/y;
const ANGLED = /<(https?:\/\/[^\s<>]*)>/y;
const WORD = /[\p{L}\p{N}]/u;

// The address, if it is one that a click may follow; null for everything but http and https.
export function safeLink(address) {
  try {
    const url = new URL(address);
    return url.protocol === "http:" || url.protocol === "https:" ? url.href : null;
  } catch {
    return null;
  }
}

export function inline(text) {
  const reader = new Inlines(text);
  while (reader.at < text.length) reader.step();
  return reader.close();
}

// One pass. `nodes` is what was read, flat; a closing mark folds all since its opening mark into one node.
class Inlines {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.nodes = [];
    this.openings = { "*": [], _: [], "~": [] }; // places in `nodes` of marks that may open
    this.noTicks = new Set(); // lengths of runs of backticks that have no match further on
  }

  step() {
    const char = this.text[this.at];
    if (char === "\\") this.escape();
    else if (char === "`") this.code();
    else if (char === "*" || char === "_" || char === "~") this.mark(char);
    else if (char === "\n") this.newline();
    else if ((char === "[" || char === "!") && this.link()) return;
    else if (char === "<" && this.address(ANGLED, 1)) return;
    else if (char === "h" && !WORD.test(this.text[this.at - 1] ?? " ") && this.address(BARE, 0)) return;
    else this.plain();
  }

  plain() {
    let end = this.at + 1;
    while (end < this.text.length && !"\\`*_~\n[!<h".includes(this.text[end])) end += 1;
    this.add(this.text.slice(this.at, end));
    this.at = end;
  }

  add(text) {
    const last = this.nodes.at(-1);
    if (last?.type === "text" && !last.mark) last.text += text;
    else this.nodes.push({ type: "text", text });
  }

  escape() {
    const next = this.text[this.at + 1] ?? "";
    if (next === "\n") this.nodes.push({ type: "break" });
    else this.add(/[!-/:-@[-`{-~]/.test(next) ? next : `\\${next}`);
    this.at += 1 + next.length;
  }

  newline() {
    const last = this.nodes.at(-1);
    if (last?.type === "text") last.text = last.text.trimEnd();
    this.nodes.push({ type: "break" }); // people who chat mean their line ends
    this.at += 1;
  }

  code() {
    const size = this.run("`");
    const from = this.at + size;
    let end = this.noTicks.has(size) ? -1 : from;
    while (end >= 0) {
      end = this.text.indexOf("`".repeat(size), end);
      if (end < 0 || (this.text[end + size] !== "`" && this.text[end - 1] !== "`")) break;
      while (this.text[end] === "`") end += 1;
    }
    if (end < 0) {
      this.noTicks.add(size);
      this.add("`".repeat(size));
      this.at = from;
      return;
    }
    const inside = this.text.slice(from, end).replaceAll("\n", " ");
    const padded = inside.startsWith(" ") && inside.endsWith(" ") && inside.trim();
    this.nodes.push({ type: "code", text: padded ? inside.slice(1, -1) : inside });
    this.at = end + size;
  }

  run(char) {
    let end = this.at;
    while (this.text[end] === char) end += 1;
    return end - this.at;
  }

  mark(char) {
    let size = this.run(char);
    const [before, after] = [this.text[this.at - 1] ?? " ", this.text[this.at + size] ?? " "];
    this.at += size;
    const inWord = char === "_" && WORD.test(before) && WORD.test(after);
    const fits = !inWord && (char === "~" ? size === 2 : size <= 3);
    while (fits && size && /\S/.test(before)) {
      const folded = this.fold(char, size);
      if (!folded) break;
      size -= folded;
    }
    if (!size) return;
    const stack = this.openings[char];
    if (fits && /\S/.test(after) && stack.push(this.nodes.length) > MOST_OPEN) stack.shift();
    this.nodes.push({ type: "text", text: char.repeat(size), mark: true });
  }

  // Closes the last open mark; returns how many of `size` characters that took, 0 where there is nothing to close.
  fold(char, size) {
    const stack = this.openings[char];
    const place = stack.at(-1);
    if (place === undefined || place === this.nodes.length - 1) return 0;
    const opening = this.nodes[place];
    const taken = Math.min(size, opening.text.length);
    for (const other of Object.values(this.openings)) while (other.at(-1) >= place) other.pop();
    const inlines = finished(this.nodes.splice(place + 1));
    opening.text = opening.text.slice(taken);
    if (opening.text) stack.push(place);
    else this.nodes.pop();
    this.nodes.push(folded(char, taken, inlines));
    return taken;
  }

  link() {
    LINK.lastIndex = this.at;
    const found = LINK.exec(this.text);
    const href = found && safeLink(found[2]);
    if (!href) return false;
    const label = found[1].replace(/\\([!-/:-@[-`{-~])/g, "$1");
    this.nodes.push({ type: "link", href, text: label || found[2] });
    this.at += found[0].length;
    return true;
  }

  address(pattern, group) {
    pattern.lastIndex = this.at;
    const found = pattern.exec(this.text);
    if (!found) return false;
    let [whole, address] = [found[0], found[group]];
    if (!group) whole = address = trimmed(address);
    const href = safeLink(address);
    if (!href) return false;
    this.nodes.push({ type: "link", href, text: address });
    this.at += whole.length;
    return true;
  }

  close() {
    return finished(this.nodes);
  }
}

// Without what only the reader needs; marks that opened nothing are a part of the text around them.
function finished(nodes) {
  const found = [];
  for (const { mark, ...node } of nodes) {
    const last = found.at(-1);
    if (node.type === "text" && last?.type === "text") last.text += node.text;
    else found.push(node);
  }
  return found;
}

function folded(char, size, inlines) {
  if (char === "~") return { type: "del", inlines };
  if (size === 1) return { type: "em", inlines };
  return { type: "strong", inlines: size === 2 ? inlines : [{ type: "em", inlines }] };
}

// Without what ends the sentence around an address, or the brackets.
function trimmed(address) {
  let end = address.length;
  while (".,;:!?".includes(address[end - 1] ?? " ")) end -= 1;
  const found = address.slice(0, end);
  return found.endsWith(")") && !found.includes("(") ? found.slice(0, -1) : found;
}
