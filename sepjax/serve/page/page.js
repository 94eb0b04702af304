// The parts put together.

import { ApiError, getJson, key, streamChat } from "./api.js";
import { getView, showGauge, showLayers, showText } from "./cache.js";
import { Log } from "./conversation.js";
import { element } from "./render.js";
import * as store from "./store.js";

const $ = (id) => document.getElementById(id);
const narrow = matchMedia("(max-width: 60rem)");
const log = new Log($("log"));
const runs = new Map(); // id of a conversation -> {conversation, controller}, while it is answered
let current = store.newConversation(store.settings().system ?? "");
let model = null;
let layer = null; // whose kept tokens are shown; null: the server's choice

// -- what is said ------------------------------------------------------------------------------------------------

function showError(error) {
  $("error").hidden = !error;
  $("error").firstElementChild.textContent = error ? error.message : "";
}

let undo = null;
function notice(text, back = null) {
  undo = back;
  $("notice").hidden = !text;
  $("notice").firstElementChild.textContent = text;
  $("notice").lastElementChild.hidden = !back;
}

function failed(error) {
  if (error instanceof ApiError && error.status === 401) {
    $("open-key").hidden = false;
    if (key.get()) showError(error);
    if (!$("key").open) $("key").showModal();
    return;
  }
  showError(error);
}

// -- conversations -----------------------------------------------------------------------------------------------

function keep(conversation) {
  try {
    store.save(conversation);
  } catch (error) {
    showError(error);
  }
}

// The one that is on the screen or being answered, else as it was kept.
function find(id) {
  return id === current.id ? current : runs.get(id)?.conversation ?? store.conversation(id);
}

function open(conversation) {
  current = conversation;
  if (current.draft && !$("prompt").value) $("prompt").value = current.draft;
  delete current.draft;
  fit();
  log.show(current, runs.has(current.id));
  $("title").textContent = current.title;
  showControls();
  showList();
  showGauge($("gauge"), current.use);
  showCache();
}

function openNew() {
  open(store.newConversation(store.settings().system ?? ""));
  close("side");
  $("prompt").focus();
}

function showList() {
  const found = store.conversations();
  $("list").replaceChildren(...found.map((one) => {
    const isCurrent = one.id === current.id;
    const choose = element("button", { type: "button", className: "choose", textContent: one.title });
    if (isCurrent) choose.setAttribute("aria-current", "true");
    choose.onclick = () => {
      if (one.id !== current.id) open(find(one.id) ?? one);
      close("side");
    };
    return element("li", {}, choose,
      tool("✎", `Rename “${one.title}”`, () => rename(one.id)), tool("×", `Delete “${one.title}”`, () => drop(one.id)));
  }));
}

function tool(sign, label, onclick) {
  return element("button", { type: "button", className: "quiet", title: label, "aria-label": label, textContent: sign, onclick });
}

function rename(id) {
  const of = find(id);
  const row = $("list").children[store.conversations().findIndex((one) => one.id === id)];
  const field = element("input", { value: of.title, "aria-label": "New name", maxLength: 200 });
  row.replaceChildren(field);
  field.focus();
  field.select();
  const done = (saves) => {
    field.onblur = null;
    const title = field.value.trim();
    if (saves && title) {
      Object.assign(of, { title, named: true });
      keep(of);
      if (id === current.id) $("title").textContent = title;
    }
    showList();
  };
  field.onblur = () => done(true);
  field.onkeydown = (event) => {
    if (event.key === "Enter" || event.key === "Escape") {
      event.stopPropagation();
      done(event.key === "Enter");
      $("new").focus();
    }
  };
}

function drop(id) {
  const gone = find(id);
  runs.get(id)?.controller.abort();
  store.remove(id);
  if (id === current.id) open(store.newConversation(store.settings().system ?? ""));
  else showList();
  notice(`Deleted “${gone.title}”.`, () => {
    keep(gone);
    open(gone);
  });
  $("new").focus();
}

// -- an answer ---------------------------------------------------------------------------------------------------

// What is asked for the last message, an answer: from its beginning, or from where it stands.
function request(conversation, continues) {
  const { system, ...sampling } = store.settings();
  const shown = continues ? conversation.messages : conversation.messages.slice(0, -1);
  const said = shown.map(({ role, content }) => ({ role, content }));
  const before = conversation.system ? [{ role: "system", content: conversation.system }] : [];
  return {
    model, messages: [...before, ...said], ...sampling, ...(continues ? { continue_final_message: true } : {}),
    stream: true, stream_options: { include_usage: true, include_cache: true },
  };
}

async function send() {
  const text = $("prompt").value.trim();
  if (!text || runs.has(current.id)) return;
  const conversation = current;
  const [question, answer] = [{ role: "user", content: text }, { role: "assistant", content: "" }];
  if (!conversation.messages.length && !conversation.named) conversation.title = titleOf(text);
  conversation.messages.push(question, answer);
  $("prompt").value = "";
  fit();
  log.add(question);
  log.add(answer);
  $("title").textContent = conversation.title;
  await run(conversation, answer, false);
}

// Once more from its beginning, or on from where it was cut off.
async function again(continues) {
  const answer = current.messages.at(-1);
  if (answer?.role !== "assistant" || runs.has(current.id)) return;
  const before = { ...answer };
  if (!continues) answer.content = "";
  delete answer.about;
  delete answer.cut;
  log.changed(answer);
  await run(current, answer, continues, before);
}

// `before`: what the answer was, which it is again where nothing comes.
async function run(conversation, answer, continues, before = null) {
  showError(null);
  notice("");
  $("said").textContent = "";
  const body = request(conversation, continues);
  conversation.updated = Date.now();
  if (!before) keep(conversation); // else what is kept is the answer before
  showList();
  const controller = new AbortController();
  runs.set(conversation.id, { conversation, controller, answer, before });
  log.busy(true);
  showControls();
  try {
    await read(conversation, answer, body, controller.signal);
    $("said").textContent = "The answer is complete.";
  } catch (error) {
    ended(conversation, answer, error, before);
  } finally {
    runs.delete(conversation.id);
    if (store.conversation(conversation.id)) keep(conversation); // unless it was deleted meanwhile
    log.changed(answer);
    if (conversation === current) {
      log.busy(false);
      showControls();
      showCache();
    }
  }
}

async function read(conversation, answer, body, signal) {
  const start = performance.now();
  let [first, usage, reason, id] = [null, null, null, null];
  for await (const chunk of streamChat(body, signal)) {
    id = chunk.id;
    usage = chunk.usage ?? usage;
    const choice = chunk.choices[0];
    if (choice?.delta.content) {
      first ??= performance.now() - start;
      answer.content += choice.delta.content;
      log.changed(answer);
    }
    reason = choice?.finish_reason ?? reason;
    if (chunk.cache) {
      conversation.use = chunk.cache;
      if (conversation === current) showGauge($("gauge"), chunk.cache);
    }
  }
  conversation.response = id;
  answer.about = about(usage, first, performance.now() - start, reason);
  if (reason === "length") answer.cut = "length";
}

function about(usage, first, whole, reason) {
  const seconds = (time) => (time < 950 ? `${Math.round(time)} ms` : `${(time / 1000).toFixed(time < 9950 ? 1 : 0)} s`);
  const said = [];
  if (usage) {
    const count = usage.completion_tokens;
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    said.push(`${count} token${count === 1 ? "" : "s"} in ${seconds(whole)}`);
    if (first !== null) said.push(`the first after ${seconds(first)}`);
    said.push(`${usage.prompt_tokens - cached} of ${usage.prompt_tokens} prompt tokens read anew`);
  }
  if (reason === "length") said.push("cut off at its limit of tokens");
  return said.join(" · ");
}

// An answer that did not come to its end: what there is of it stays; if that is nothing, what was before, or the
// question goes back.
function ended(conversation, answer, error, before) {
  const wasStopped = error.name === "AbortError";
  if (hasCome(answer, before)) Object.assign(answer, cutOff(wasStopped ? "stopped" : `broken off: ${error.message}`));
  else if (before) Object.assign(answer, before);
  else {
    const [question] = conversation.messages.splice(-2);
    conversation.draft = question.content; // for when it is on the screen
    if (conversation === current) open(conversation);
  }
  if (!wasStopped) failed(error);
  else if (conversation === current) $("said").textContent = "Stopped.";
}

const cutOff = (about) => ({ about, cut: "stopped" });
const hasCome = (answer, before) => answer.content && answer.content !== before?.content;

const titleOf = (text) => (text.length > 48 ? `${text.slice(0, 47).trimEnd()}…` : text).replace(/\s+/g, " ");

function showControls() {
  const isRunning = runs.has(current.id);
  const hadFocus = ["stop", "continue", "again"].includes(document.activeElement.id);
  $("send").hidden = isRunning;
  $("stop").hidden = !isRunning;
  const last = current.messages.at(-1);
  $("more").hidden = isRunning || last?.role !== "assistant";
  $("continue").hidden = !last?.cut || !last.content;
  if (hadFocus) (isRunning ? $("stop") : $("prompt")).focus();
}

// -- the cache ---------------------------------------------------------------------------------------------------

async function showCache() {
  const conversation = current;
  const isCut = conversation.messages.at(-1)?.cut === "stopped"; // which the server keeps nothing of
  if (!conversation.response) {
    const why = isCut ? "An answer that was stopped has no cache any more." : "Shown once there is an answer.";
    $("text").replaceChildren(element("p", { className: "muted", textContent: why }));
    $("layers").hidden = true;
    return;
  }
  if (!isOpen("cache")) return;
  try {
    const view = await getView(conversation.response, layer);
    if (conversation !== current || runs.has(current.id)) return;
    showGauge($("gauge"), view);
    showLayers($("layers"), view, (chosen) => {
      layer = chosen;
      showCache();
    });
    showText($("text"), view);
    if (isCut) $("text").append(element("p", { className: "muted", textContent: "Up to the answer before the one that was stopped." }));
  } catch (error) {
    if (conversation !== current) return;
    if (error.status === 401) failed(error);
    $("text").replaceChildren(element("p", { className: "muted", textContent: error.message }));
  }
}

// -- panels, forms, keys -----------------------------------------------------------------------------------------

const isOpen = (id) => document.body.classList.contains(`with-${id}`);

function toggle(id, isShown) {
  document.body.classList.toggle(`with-${id}`, isShown);
  $(`open-${id}`).setAttribute("aria-expanded", String(isShown));
  if (isShown && id === "cache") showCache();
  if (isShown && narrow.matches) $(id).querySelector("button").focus();
}

function close(id) {
  if (narrow.matches && isOpen(id)) {
    toggle(id, false);
    $(`open-${id}`).focus();
  }
}

// As high as its text, up to a limit of the style.
function fit() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight + 2}px`;
}

function fillSettings() {
  const values = store.settings();
  for (const field of $("settings").querySelectorAll("[name]")) field.value = values[field.name] ?? "";
}

function takeSettings() {
  const values = {};
  for (const field of $("settings").querySelectorAll("[name]")) {
    if (field.value === "") continue;
    values[field.name] = field.type === "number" ? field.valueAsNumber : field.value;
  }
  try {
    store.saveSettings(values);
  } catch (error) {
    showError(error);
  }
  if (!current.messages.length) {
    current.system = values.system ?? "";
    log.show(current, false);
  }
}

async function connect() {
  try {
    const { data } = await getJson("v1/models");
    model = data[0].id;
    $("model").textContent = model;
    showError(null);
    showCache();
  } catch (error) {
    if (error.status === 503 || error.status === 0) setTimeout(connect, 2000);
    failed(error);
  }
}

function listen() {
  $("composer").onsubmit = (event) => {
    event.preventDefault();
    send();
  };
  $("prompt").oninput = fit;
  $("prompt").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  };
  $("continue").onclick = () => again(true);
  $("again").onclick = () => again(false);
  addEventListener("pagehide", () => {
    for (const { conversation, answer, before } of runs.values()) {
      // A copy: a page that comes back goes on with the answer itself.
      const left = before && !hasCome(answer, before) ? before : { ...answer, ...cutOff("stopped") };
      if (store.conversation(conversation.id)) keep({ ...conversation, messages: [...conversation.messages.slice(0, -1), left] });
    }
  });
  $("stop").onclick = () => runs.get(current.id)?.controller.abort();
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (runs.has(current.id)) runs.get(current.id).controller.abort();
    else for (const id of ["side", "cache"]) close(id);
  });
  $("new").onclick = openNew;
  for (const id of ["side", "cache"]) $(`open-${id}`).onclick = () => toggle(id, !isOpen(id));
  for (const button of document.querySelectorAll("[data-close]")) button.onclick = () => close(button.dataset.close);
  $("open-settings").onclick = () => {
    fillSettings();
    $("settings").showModal();
  };
  $("settings").querySelector("form").onsubmit = takeSettings;
  $("open-key").onclick = () => $("key").showModal();
  $("key").querySelector("[data-cancel]").onclick = () => $("key").close();
  $("key").querySelector("form").onsubmit = (event) => {
    key.set(event.target.elements.key.value.trim());
    event.target.reset();
    connect();
  };
  $("error").lastElementChild.onclick = () => showError(null);
  $("notice").lastElementChild.onclick = () => {
    undo?.();
    notice("");
  };
  addEventListener("storage", (event) => {
    if (!store.isOfConversation(event.key)) return;
    const changed = store.conversation(current.id);
    if (changed && !runs.has(current.id) && changed.updated > current.updated) open(changed);
    else showList();
  });
}

listen();
narrow.onchange = () => {
  toggle("side", false);
  toggle("cache", !narrow.matches);
};
toggle("cache", !narrow.matches);
open(store.conversations()[0] ?? current);
if (!store.isLasting) notice("This browser keeps nothing: conversations go with this page.");
if (!narrow.matches) $("prompt").focus();
connect();
