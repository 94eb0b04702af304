// The messages of a conversation on the screen.

import { element, showMarkdown } from "./render.js";

const NEAR = 60; // pixels from the end at which what is new is followed

export class Log {
  constructor(target) {
    this.target = target;
    this.frame = 0;
    this.waiting = new Set();
  }

  // Shows all of it.
  show(conversation, isRunning) {
    this.waiting.clear();
    this.target.replaceChildren(...conversation.messages.map((message) => this.made(message)));
    if (!conversation.messages.length) this.target.append(welcome(conversation));
    this.busy(isRunning);
    this.target.scrollTop = this.target.scrollHeight;
  }

  add(message) {
    this.target.querySelector(".welcome")?.remove();
    this.target.append(this.made(message));
    this.target.scrollTop = this.target.scrollHeight;
  }

  // A screen reader waits until an answer is whole, and does not read every piece.
  busy(isRunning) {
    this.target.setAttribute("aria-busy", String(isRunning));
  }

  // Shows at the next frame what an answer has become, however often that is said.
  changed(message) {
    this.waiting.add(message);
    this.frame ||= requestAnimationFrame(() => this.flush());
  }

  flush() {
    this.frame = 0;
    const { scrollHeight, scrollTop, clientHeight } = this.target;
    const follows = scrollHeight - scrollTop - clientHeight < NEAR;
    for (const message of this.waiting) {
      const place = [...this.target.children].find((child) => child.message === message);
      if (place) this.fill(place, message);
    }
    this.waiting.clear();
    if (follows) this.target.scrollTop = this.target.scrollHeight;
  }

  made(message) {
    const isUser = message.role === "user";
    const place = element("article", { className: `message ${message.role}` },
      element("h3", { className: "unseen", textContent: isUser ? "You" : "Answer" }),
      element("div", { className: "body", dir: "auto" }),
      element("p", { className: "about muted" }));
    place.message = message;
    this.fill(place, message);
    return place;
  }

  fill(place, message) {
    const [, body, about] = place.children;
    if (message.role === "user") body.textContent = message.content;
    else showMarkdown(body, message.content);
    body.classList.toggle("waits", message.role !== "user" && !message.content && !message.about);
    place.classList.toggle("stopped", message.cut === "stopped");
    about.textContent = message.about ?? "";
    about.hidden = !message.about;
  }
}

function welcome(conversation) {
  const about = "However long this conversation gets, its cache keeps its size: the first tokens, the newest, and of all "
    + "between them those that are worth keeping. What the cache holds of the text is shown beside it.";
  const made = element("div", { className: "welcome" }, element("h3", { textContent: "Ask something" }),
    element("p", { textContent: about }));
  if (conversation.system) made.append(element("p", { className: "muted", textContent: `System: ${conversation.system}` }));
  return made;
}
