// The gauge of a conversation's cache, and its text with what the cache holds of it.

import { getJson } from "./api.js";
import { element } from "./render.js";

const NAMES = { sink: "sinks", kept: "kept", recent: "recent", evicted: "evicted" };
const ABOUT = {
  sink: "the first tokens, never let go",
  kept: "kept out of the past",
  recent: "the newest, all of them",
  evicted: "let go",
};
const numbers = new Intl.NumberFormat("en");

export function bytes(count) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let [value, unit] = [count, 0];
  while (value >= 1000 && unit < units.length - 1) [value, unit] = [value / 1000, unit + 1];
  return `${value >= 100 || !unit ? Math.round(value) : value.toPrecision(3)} ${units[unit]}`;
}

// `use` is {held, size, bytes, seen, sinks, kept, recent} as chunks of an answer bear it; the whole view has `kinds` of
// layers, too, where they differ.
export function showGauge(target, use) {
  if (!use) {
    target.replaceChildren(element("p", { className: "muted", textContent: "Nothing has been read yet." }));
    return;
  }
  const { held, size, seen } = use;
  const scale = Math.max(seen, size);
  target.replaceChildren(
    ...slots("Slots held", use),
    ...(use.kinds ?? []).flatMap((kind) => slots(layersOf(kind.layers), kind)),
    legend(use),
    line("Tokens read", numbers.format(seen)),
    meter(`${seen} tokens read, ${held} of them held`, [part("held", held / scale), part("evicted", (seen - held) / scale)]),
    line("Memory, whatever it holds", bytes(use.bytes)),
    line("If nothing were let go", `about ${bytes((use.bytes / size) * seen)}`),
  );
}

// How full some layers are, and with what.
function slots(name, { held, size, sinks, kept, recent }) {
  const zones = sinks === undefined ? [["held", held]] : [["sink", sinks], ["kept", kept], ["recent", recent]];
  const label = sinks === undefined ? "" : `: sinks ${sinks}, kept ${kept}, recent ${recent}`;
  return [
    line(name, `${numbers.format(held)} of ${numbers.format(size)}`),
    meter(`${name}: ${held} of ${size} slots held${label}`, zones.map(([kind, count]) => part(kind, count / size))),
  ];
}

// "Layers 1, 3–5", as people count them.
function layersOf(layers) {
  const runs = [];
  for (const layer of layers) {
    if (runs.at(-1)?.[1] === layer - 1) runs.at(-1)[1] = layer;
    else runs.push([layer, layer]);
  }
  const said = runs.map(([first, last]) => (first === last ? `${first + 1}` : `${first + 1}–${last + 1}`));
  return `${layers.length > 1 ? "Layers" : "Layer"} ${said.join(", ")}`;
}

function line(name, value) {
  return element("p", { className: "line" },
    element("span", { textContent: name }), element("strong", { textContent: value }));
}

function part(kind, share) {
  const made = element("span", { className: kind });
  made.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return made;
}

function meter(label, parts) {
  return element("div", { className: "meter", role: "img", "aria-label": label }, ...parts);
}

// How many of each; where an older page has kept no such numbers, its room.
function legend(use) {
  const made = element("ul", { className: use.sinks === undefined ? "legend unknown" : "legend" });
  for (const [kind, count] of [["sink", use.sinks], ["kept", use.kept], ["recent", use.recent], ["evicted"]]) {
    const said = count === undefined ? NAMES[kind] : `${NAMES[kind]} ${numbers.format(count)}`;
    made.append(element("li", { title: ABOUT[kind] }, element("span", { className: `token ${kind}`, textContent: said })));
  }
  return made;
}

// What the server says of the cache behind a response. Raises ApiError; 404: it is not kept any more.
export function getView(response, layer) {
  const asked = layer === null ? "" : `?layer=${encodeURIComponent(layer)}`;
  return getJson(`v1/cache/${encodeURIComponent(response)}${asked}`);
}

// Tokens one after the other of the same kind are one element: long texts have few.
export function showText(target, view) {
  const runs = [];
  for (const token of view.tokens) {
    const kind = token.omitted ? "omitted" : token.state;
    const last = runs.at(-1);
    const text = token.omitted ? ` … ${numbers.format(token.omitted)} tokens, let go … ` : token.text;
    const share = Math.ceil(Math.sqrt(token.share ?? 1) * 3); // 1 to 3: few layers hold it, or many
    if (last && last.kind === kind && last.share === share && !token.control && !last.control) last.text += text;
    else runs.push({ kind, text, share, control: token.control });
  }
  target.replaceChildren(...runs.map(({ kind, text, share, control }) => {
    const name = `token ${kind}${kind === "kept" && share < 3 ? ` share${share}` : ""}${control ? " control" : ""}`;
    return element(kind === "kept" || kind === "sink" ? "mark" : "span", { className: name, textContent: text });
  }));
  target.scrollTop = target.scrollHeight;
}

// The choice of a layer, where layers keep tokens of their own.
export function showLayers(label, view, onChange) {
  label.hidden = view.layers < 2;
  const select = label.querySelector("select");
  if (select.length !== view.layers + 2) {
    const names = [["any", "any layer"], ["all", "all layers"]];
    for (let i = 0; i < view.layers; i += 1) names.push([String(i), `layer ${i + 1}`]);
    select.replaceChildren(...names.map(([value, text]) => element("option", { value, textContent: text })));
    select.onchange = () => onChange(select.value);
  }
  select.value = String(view.layer);
}
