// Requests to the server of this page, and answers as they come.

const KEY = "sepjax.key";

export class ApiError extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

// The key is forgotten with the tab.
export const key = {
  get: () => {
    try {
      return sessionStorage.getItem(KEY) ?? "";
    } catch {
      return key.value ?? "";
    }
  },
  set: (value) => {
    key.value = value;
    try {
      sessionStorage.setItem(KEY, value);
    } catch {
      // A browser that keeps nothing: it is kept as long as the page.
    }
  },
};

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "the server does not answer; is it running?");
  }
  if (!answer.ok) throw await failure(answer);
  return answer;
}

async function failure(answer) {
  let said = null;
  try {
    said = (await answer.json()).error;
  } catch {
    // Not this server: a proxy, say.
  }
  return new ApiError(answer.status, said?.message ?? `the server answered ${answer.status}`, said?.code);
}

export async function getJson(path) {
  return (await ask(path)).json();
}

// Yields the chunks of a streamed answer. Ends early by `signal`; raises ApiError, or AbortError.
export async function* streamChat(body, signal) {
  const answer = await ask("v1/chat/completions", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
  });
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(0, chunk.error.message, chunk.error.code);
    yield chunk;
  }
  throw new ApiError(0, "the connection ended before the answer did");
}

// The data of server-sent events.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "the connection broke");
  } finally {
    reader.cancel().catch(() => {});
  }
}
