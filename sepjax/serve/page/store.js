// What the browser keeps: conversations, one entry each so that two tabs do not undo each other's, and the settings.

const CONVERSATION = "sepjax.conversation.";
const SETTINGS = "sepjax.settings";

const memory = new Map(); // where the browser keeps nothing
const storage = available();
export const isLasting = storage !== null;

function available() {
  try {
    localStorage.setItem("sepjax.test", "1");
    localStorage.removeItem("sepjax.test");
    return localStorage;
  } catch {
    return null;
  }
}

const get = (name) => (storage ? storage.getItem(name) : memory.get(name)) ?? null;
const names = () => (storage ? Object.keys(storage) : [...memory.keys()]);

function set(name, value) {
  try {
    if (storage) storage.setItem(name, value);
    else memory.set(name, value);
  } catch {
    throw new Error("the browser has no more room for conversations; delete some");
  }
}

function read(name) {
  try {
    return JSON.parse(get(name));
  } catch {
    return null;
  }
}

export function newConversation(system) {
  const id = `${Date.now().toString(36)}${Math.random().toString(36).slice(2, 8)}`;
  return { id, title: "New conversation", named: false, system, messages: [], response: null, updated: Date.now() };
}

// The most recently used first.
export function conversations() {
  const found = names().filter((name) => name.startsWith(CONVERSATION)).map(read);
  const whole = found.filter((one) => one && typeof one.id === "string" && Array.isArray(one.messages));
  return whole.sort((a, b) => b.updated - a.updated);
}

export const conversation = (id) => read(CONVERSATION + id);
export const isOfConversation = (name) => name === null || name.startsWith(CONVERSATION);

export function save(conversation) {
  set(CONVERSATION + conversation.id, JSON.stringify(conversation));
}

export function remove(id) {
  if (storage) storage.removeItem(CONVERSATION + id);
  else memory.delete(CONVERSATION + id);
}

export const settings = () => read(SETTINGS) ?? {};
export const saveSettings = (values) => set(SETTINGS, JSON.stringify(values));
