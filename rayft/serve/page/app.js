// The playground: one question, several answers beside each other. Whatever comes from the server is shown as text.

const SHOWN = 100; // names in the list; more than that are found by typing
const REFRESH = 5000; // milliseconds
const at = (id) => document.getElementById(id);

/** An element with a class and a text. */
function make(tag, name = "", text = "") {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text) element.textContent = text;
  return element;
}

const state = {
  models: [], // of /v1/models, the base first
  adapters: new Map(), // name -> what /v1/adapters says, empty without an admin key
  chosen: null, // names in the order in which they were chosen; null until the first list has come
  columns: new Map(), // name -> Column
  talk: crypto.getRandomValues(new Uint32Array(2)).join("-"), // keeps one conversation with one version
};

function headers() {
  const key = at("key").value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

/** What went wrong, in the server's words. */
async function problem(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

/** The objects of a stream of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split(/\r?\n\r?\n/);
    held = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
      if (!data.length) continue; // a comment that keeps the connection open
      if (data[0] === "[DONE]") return;
      yield JSON.parse(data.join("\n"));
    }
  }
}

class Column {
  constructor(name) {
    this.name = name;
    this.messages = [];
    this.element = make("section", "column");
    this.element.setAttribute("aria-label", name);
    const head = make("header");
    this.version = make("span", "badge");
    this.speed = make("span", "speed");
    head.append(make("h3", "", name), this.version, this.speed);
    this.talk = make("div", "talk");
    this.talk.setAttribute("aria-live", "polite");
    this.talk.tabIndex = 0;
    this.element.append(head, this.talk);
  }

  reset() {
    this.stop();
    this.messages = [];
    this.talk.replaceChildren();
    this.version.textContent = this.speed.textContent = "";
  }

  stop() {
    this.running?.abort();
  }

  say(role, text) {
    const element = make("div", `message ${role}`, text);
    this.talk.append(element);
    this.talk.scrollTop = this.talk.scrollHeight;
    return element;
  }

  async ask(question) {
    const running = (this.running = new AbortController());
    this.say("user", question);
    const shown = this.say("assistant running");
    const answer = { text: "", tokens: 0, finish: null, wrong: null, began: performance.now(), first: null, last: null };
    try {
      await this.receive(question, shown, answer, running.signal);
    } catch (error) {
      if (error.name === "AbortError") answer.finish = "stopped";
      else answer.wrong = error.message;
    }
    shown.classList.remove("running");
    if (this.running === running) this.running = null;
    else if (!shown.isConnected) return; // a new conversation has begun
    if (answer.wrong !== null) {
      shown.classList.add("wrong");
      shown.textContent = answer.text ? `${answer.text}\n\n${answer.wrong}` : answer.wrong;
      return;
    }
    this.messages.push({ role: "user", content: question }, { role: "assistant", content: answer.text });
    const notes = { length: "cut off at the longest answer", stopped: "stopped", tool_calls: "called a function" };
    if (notes[answer.finish]) this.talk.append(make("p", "note", notes[answer.finish]));
    this.talk.scrollTop = this.talk.scrollHeight;
  }

  async receive(question, shown, answer, signal) {
    const system = at("system").value.trim();
    const seed = at("seed").value;
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal,
      body: JSON.stringify({
        model: this.name,
        messages: [...(system ? [{ role: "system", content: system }] : []), ...this.messages, { role: "user", content: question }],
        temperature: Number(at("temperature").value),
        max_tokens: Number(at("tokens").value) || 256,
        ...(seed === "" ? {} : { seed: Number(seed) }),
        user: state.talk,
        stream: true,
        stream_options: { include_usage: true },
      }),
    });
    if (response.status === 401) at("key").focus();
    if (!response.ok) throw new Error(await problem(response));
    const version = response.headers.get("x-rayft-version");
    this.version.textContent = version ? `v${version}` : "";
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) answer.tokens = chunk.usage.completion_tokens;
      const choice = chunk.choices?.[0];
      if (choice?.finish_reason) answer.finish = choice.finish_reason;
      if (choice?.delta?.content) {
        answer.last = performance.now();
        answer.first ??= answer.last;
        answer.tokens += 1;
        const follows = this.talk.scrollHeight - this.talk.scrollTop - this.talk.clientHeight < 60;
        answer.text += choice.delta.content;
        shown.textContent = answer.text;
        if (follows) this.talk.scrollTop = this.talk.scrollHeight;
      }
      this.measure(answer);
    }
    this.measure(answer);
  }

  /** Tokens per second between the first and the last one, and how long the first one took. */
  measure(answer) {
    if (answer.first === null) return;
    const seconds = (answer.last - answer.first) / 1000;
    const speed = seconds > 0 && answer.tokens > 1 ? `${((answer.tokens - 1) / seconds).toFixed(0)} tokens/s` : "";
    this.speed.textContent = [speed, `first after ${(answer.first - answer.began).toFixed(0)} ms`].filter(Boolean).join(" · ");
  }
}

/** Columns are those that are chosen, in the order of the list; others keep their conversation for later. */
function arrange() {
  const order = state.models.map((model) => model.id).filter((name) => state.chosen.includes(name));
  for (const name of order) if (!state.columns.has(name)) state.columns.set(name, new Column(name));
  const elements = order.map((name) => state.columns.get(name).element);
  const there = [...at("columns").children];
  if (elements.length === there.length && elements.every((element, index) => element === there[index])) return;
  at("columns").replaceChildren(...elements);
}

const answering = () => [...state.columns.values()].filter((column) => column.element.isConnected);

function listed(model) {
  const entry = make("li", "model");
  const label = make("label");
  const box = make("input");
  box.type = "checkbox";
  box.checked = state.chosen.includes(model.id);
  box.addEventListener("change", () => {
    state.chosen = box.checked ? [...state.chosen, model.id] : state.chosen.filter((name) => name !== model.id);
    arrange();
  });
  label.append(box, make("span", "", model.id));
  if (!model.parent) label.append(make("small", "", "base"));
  entry.append(label);
  const versions = (state.adapters.get(model.id)?.versions ?? []).filter((version) => version.weight > 0);
  if (versions.length) {
    const production = state.adapters.get(model.id).production;
    const shares = make("div", "shares");
    for (const version of versions) {
      const share = make("span", version.number === production ? "share" : "share canary");
      share.style.flexGrow = version.weight;
      shares.append(share);
    }
    const whole = versions.reduce((sum, version) => sum + version.weight, 0);
    const words = versions.map((version) => `v${version.number} ${Math.round((100 * version.weight) / whole)}%`);
    entry.append(shares, make("p", "legend", words.join(" · ")));
  }
  return entry;
}

let drawn = "";

/** The list, drawn anew only when something has changed: the keyboard's place in it stays. */
function list() {
  const wanted = at("filter").value.trim().toLowerCase();
  const found = state.models.filter((model) => model.id.toLowerCase().includes(wanted));
  const shown = found.slice(0, SHOWN);
  const now = JSON.stringify([shown, shown.map((model) => state.adapters.get(model.id)), state.chosen]);
  if (now === drawn) return;
  drawn = now;
  const focused = document.activeElement?.closest?.(".model label")?.textContent;
  at("models").replaceChildren(...shown.map(listed));
  for (const label of at("models").querySelectorAll("label")) if (label.textContent === focused) label.firstChild.focus();
  at("filter").hidden = state.models.length <= 12;
  at("more").hidden = found.length <= SHOWN;
  at("more").textContent = `and ${found.length - SHOWN} more`;
}

function status(text, kind) {
  at("state").textContent = text;
  at("state").className = `state ${kind}`;
}

async function refresh() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) {
      status(response.status === 401 ? "a key is needed" : await problem(response), "wrong");
      return;
    }
    state.models = (await response.json()).data;
    const adapters = await fetch("v1/adapters", { headers: headers() }); // for admin keys only
    state.adapters = new Map(adapters.ok ? (await adapters.json()).data.map((adapter) => [adapter.name, adapter]) : []);
    at("base").textContent = state.models.find((model) => !model.parent)?.id ?? "";
    state.chosen ??= state.models.slice(0, 2).map((model) => model.id);
    list();
    arrange();
    status("ready", "good");
  } catch {
    status("the server does not answer", "wrong");
  }
}

async function send() {
  const question = at("question").value.trim();
  const columns = answering();
  if (!question || !columns.length || !at("stop").disabled) return;
  at("question").value = "";
  at("send").disabled = true;
  at("stop").disabled = false;
  await Promise.all(columns.map((column) => column.ask(question)));
  at("send").disabled = false;
  at("stop").disabled = true;
}

const stop = () => state.columns.forEach((column) => column.stop());

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
at("stop").addEventListener("click", stop);
at("fresh").addEventListener("click", () => {
  state.columns.forEach((column) => column.reset());
  state.talk = crypto.getRandomValues(new Uint32Array(2)).join("-");
  at("question").focus();
});
at("filter").addEventListener("input", list);
at("temperature").addEventListener("input", () => {
  at("temperature-shown").textContent = Number(at("temperature").value).toFixed(1);
});
at("key").value = sessionStorage.getItem("key") ?? "";
at("key").addEventListener("change", () => {
  sessionStorage.setItem("key", at("key").value);
  refresh();
});
refresh();
setInterval(() => document.hidden || refresh(), REFRESH);
