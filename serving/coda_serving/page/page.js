// The playground: chat and infilling with the canvas in view. Text of people and of the model is only ever set as text.

const $ = (id) => document.getElementById(id);

/** An element with properties and children; strings become text nodes. */
function make(tag, properties = {}, ...children) {
  const { dataset, attributes, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  Object.assign(element.dataset, dataset);
  for (const [name, value] of Object.entries(attributes ?? {})) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const say = (text) => { $("live").textContent = text; };
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

// ---- the server

class ServerError extends Error {
  constructor({ message, param = null, code = null }, status = 0) {
    super(message);
    Object.assign(this, { param, code, status });
  }
}

let key = sessionStorage.getItem("coda-key") ?? "";

async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError({ message: "The server cannot be reached. Is it still running?" });
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const fault = body?.error ?? { message: `The server answered with status ${response.status}.` };
  if (response.status === 401) askForKey(key ? "The server does not know this key." : "");
  throw new ServerError(fault, response.status);
}

/** The JSON of each event of a stream, until it says that it is done. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true }; // the connection broke
    });
    if (done) throw new ServerError({ message: "The connection ended before the answer did." });
    const frames = (rest + value).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      if (!frame.startsWith("data: ")) continue; // a comment that keeps the connection open
      const data = frame.slice(6);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(event.error);
      yield event;
    }
  }
}

// ---- one answer: its canvas, its cost, what can be done with it

class Answer {
  constructor({ before = "", after = "", waiting = "Waiting for its turn" } = {}) {
    this.waiting = waiting;
    this.text = "";
    this.cells = [];
    this.changed = new Set();
    this.map = make("div", { className: "map", attributes: { "aria-hidden": "true" } });
    this.canvas = make("div", { className: "canvas", attributes: { "aria-hidden": "true" } });
    this.spoken = make("div", { className: "hidden" });
    this.map.append(...Array.from({ length: 24 }, () => make("i", { className: "masked" })));
    this.cost = make("span", { className: "cost" }, waiting);
    this.shades = make("button", { className: "quiet small", type: "button" }, "Shades");
    this.copy = make("button", { className: "quiet small", type: "button" }, "Copy");
    this.facts = make("div", { className: "facts" }, this.cost, this.shades, this.copy);
    this.element = make("article", { className: "answer waiting", attributes: { "aria-label": "Answer" } });
    this.element.append(this.map, this.canvas, this.spoken, this.facts);
    this.element.setAttribute("aria-busy", "true");
    this.ends = [before, after].map((text) => make("span", { className: "outside" }, text));
    this.canvas.append(this.ends[0], this.ends[1]);
    this.before = before;
    this.after = after;
    this.showShades(true);
    this.shades.addEventListener("click", () => this.showShades(this.element.classList.contains("plain")));
    this.copy.addEventListener("click", () => this.copyWhole());
    this.canvas.addEventListener("pointerover", (event) => this.explain(event.target));
    this.map.addEventListener("pointerover", (event) => this.explain(event.target));
    this.started = performance.now();
    this.clock = setInterval(() => this.tick(), 100);
  }

  get whole() { return this.before + this.text + this.after; }

  showShades(on) {
    this.element.classList.toggle("plain", !on);
    this.shades.setAttribute("aria-pressed", String(on));
  }

  async copyWhole() {
    try {
      await copyText(this.whole);
      this.copy.textContent = "Copied";
    } catch (error) {
      if (error.name !== "NotAllowedError") throw error;
      this.copy.textContent = "Not allowed";
    }
    say(this.copy.textContent);
    setTimeout(() => { this.copy.textContent = "Copy"; }, 1500);
  }

  explain(target) {
    const cell = this.cells[target.dataset?.place];
    if (!cell) return;
    const sure = cell.confidence === null ? "" : `, ${Math.round(cell.confidence * 100)} %`;
    const since = cell.step ? `, step ${cell.step}` : "";
    target.title = `${cell.text === null ? "end" : JSON.stringify(cell.text)}: ${cell.state}${sure}${since}`;
  }

  /** What an event says of the canvas. */
  take(canvas) {
    if (canvas.length !== undefined) {
      for (const cell of this.cells) cell.span.remove();
      this.map.replaceChildren();
      this.cells = Array.from({ length: canvas.length }, (_, place) => ({
        text: "", state: "masked", confidence: null, step: 0,
        span: make("span", { className: "cell masked", dataset: { place } }),
        square: make("i", { className: "masked", dataset: { place } }),
      }));
      this.ends[0].after(...this.cells.map((cell) => cell.span));
      this.map.append(...this.cells.map((cell) => cell.square));
      this.map.classList.toggle("dense", canvas.length > 200);
      this.map.classList.toggle("dust", canvas.length > 800);
      this.element.classList.remove("waiting");
    }
    this.step = canvas.step;
    for (const [place, text, state, confidence] of canvas.cells) {
      Object.assign(this.cells[place], { text, state, confidence, step: canvas.step });
      this.changed.add(place);
    }
    this.draw();
  }

  draw() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.drawNow();
    });
  }

  drawNow() {
    keepAtEnd(() => {
      for (const place of this.changed) {
        const { text, state, confidence, span, square } = this.cells[place];
        const isEnd = text === null;
        if (span.textContent !== (text ?? "")) span.textContent = text ?? "";
        span.className = `cell ${state}${isEnd ? " end" : ""}`;
        square.className = state;
        for (const element of [span, square]) element.style.setProperty("--p", Math.round((confidence ?? 0) * 10));
      }
      this.changed.clear();
      const end = this.cells.findIndex((cell) => cell.text === null && cell.state === "committed");
      this.cells.forEach((cell, place) => {
        for (const element of [cell.span, cell.square]) element.classList.toggle("beyond", end >= 0 && place >= end);
      });
      // The canvas never becomes smaller while it fills, so that nothing below it jumps.
      this.canvas.style.minHeight = `${this.canvas.offsetHeight}px`;
    });
    this.tick();
  }

  tick() {
    const seconds = ((performance.now() - this.started) / 1000).toFixed(1);
    if (this.cells.length === 0) {
      this.cost.textContent = `${this.waiting}, ${seconds} s`;
      return;
    }
    const gap = this.cells.filter((cell) => cell.state !== "given");
    const done = gap.filter((cell) => cell.state === "committed").length;
    this.cost.textContent = `Step ${this.step}, ${done} of ${gap.length} tokens, ${seconds} s`;
  }

  /** The last thing that happens to an answer. Without `usage` it is not whole, and its canvas stays as it was. */
  finish({ usage = null, note = "" } = {}) {
    clearInterval(this.clock);
    cancelAnimationFrame(this.frame);
    this.drawNow();
    if (usage) {
      const seconds = ((performance.now() - this.started) / 1000).toFixed(1);
      this.cost.textContent = [
        plural(usage.completion_tokens, "token"), plural(usage.forwards, "forward"),
        `${usage.tokens_per_forward.toFixed(2)} per forward`, `${seconds} s`,
      ].join(" \u00b7 ");
      this.element.classList.add("whole");
      this.canvas.style.minHeight = "";
      this.cut();
      if (!this.text) this.ends[0].after(make("span", { className: "empty" }, "An empty answer."));
    }
    if (note) this.cost.append(` \u00b7 ${note}`);
    this.element.classList.remove("waiting");
    this.element.classList.add("done");
    this.element.removeAttribute("aria-busy");
    this.spoken.textContent = this.whole;
  }

  /** Show of the cells what became the answer; a stop string may end it inside of one. */
  cut() {
    let left = this.text.length;
    for (const cell of this.cells) {
      const isPart = left > 0 && cell.text && cell.state !== "masked" && cell.state !== "provisional";
      if (!isPart) {
        cell.span.classList.add("beyond");
        cell.square.classList.toggle("beyond", cell.state !== "masked");
        continue;
      }
      if (cell.text.length > left) cell.span.textContent = cell.text.slice(0, left);
      left -= cell.text.length;
    }
    if (left > 0) { // cells and text disagree, or nothing of the canvas came: the text counts
      for (const cell of this.cells) cell.span.remove();
      this.ends[0].after(make("span", {}, this.text));
    }
  }
}

/** Do something to the conversation; who sees its end goes on seeing it. */
function keepAtEnd(change) {
  const box = $("conversation");
  const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  change();
  if (isAtEnd) box.scrollTop = box.scrollHeight;
}

/** Browsers have a clipboard only for pages of this machine and of https. */
async function copyText(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const box = make("textarea", { value: text, className: "hidden" });
  document.body.append(box);
  box.select();
  const isDone = document.execCommand("copy");
  box.remove();
  if (!isDone) throw new DOMException("The browser does not copy.", "NotAllowedError");
}

function problem(error, again) {
  const button = make("button", { type: "button" }, "Try again");
  const box = make("div", { className: "problem", attributes: { role: "alert" } }, make("p", {}, error.message), button);
  button.addEventListener("click", () => { box.remove(); again(); });
  return box;
}

// ---- what runs

let running = null; // {abort, button}

const stop = () => running?.abort.abort();
const isRunning = (button) => running?.button === $(button);

/** Stream one answer, to which what runs gives way; false when it failed. */
async function stream(path, body, answer, button, isChat) {
  stop();
  const abort = new AbortController();
  const word = button.textContent;
  running = { abort, button };
  button.textContent = "Stop";
  button.classList.add("stop");
  say("The answer is being denoised.");
  let usage = null;
  let reason = null;
  try {
    const response = await ask(path, {
      method: "POST",
      signal: abort.signal,
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({
        ...body, stream: true, stream_options: { include_usage: true, include_canvas: true },
      }),
    });
    for await (const event of eventsOf(response)) {
      if (event.usage) usage = event.usage;
      for (const choice of event.choices) {
        answer.text += (isChat ? choice.delta.content : choice.text) ?? "";
        if (choice.canvas) answer.take(choice.canvas);
        reason = choice.finish_reason ?? reason;
      }
    }
    answer.finish({ usage, note: reason === "length" && isChat ? "cut at max_tokens" : "" });
    say(`The answer is there: ${plural(usage?.completion_tokens ?? 0, "token")}.`);
    return true;
  } catch (error) {
    if (error.name === "AbortError") {
      answer.finish({ note: "stopped" });
      say("Stopped.");
      return true;
    }
    answer.finish({ note: "failed" });
    if (error.param) markField(error.param);
    if (!(error instanceof ServerError)) throw error;
    answer.fault = error;
    return false;
  } finally {
    if (running?.abort === abort) running = null;
    button.textContent = word;
    button.classList.remove("stop");
  }
}

// ---- chat

const SAMPLES = [
  "Write a function that checks whether a number is prime.",
  "Write a function that reverses the words of a sentence.",
  "Write a function that returns the n-th Fibonacci number.",
  "Return the sum of the squares of the even numbers in numbers.",  // which the small model of quickstart.sh can answer
];
const messages = [];

async function chat(text) {
  messages.push({ role: "user", content: text });
  $("welcome").hidden = true;
  $("clear").hidden = false;
  const turn = make("li", {}, make("p", { className: "said" }, text));
  $("turns").append(turn);
  await answerLast();
}

async function answerLast() {
  const answer = new Answer();
  const turn = make("li", {}, answer.element);
  $("turns").append(turn);
  $("conversation").scrollTop = $("conversation").scrollHeight;
  const system = $("system")?.value.trim();
  const asked = [...(system ? [{ role: "system", content: system }] : []), ...messages];
  const isGiven = await stream("v1/chat/completions", { messages: asked, ...settings() }, answer, $("send"), true);
  if (!turn.isConnected) return; // another chat has begun
  if (isGiven) {
    if (answer.text) messages.push({ role: "assistant", content: answer.text });
  } else {
    if (!answer.cells.length) answer.element.remove();
    keepAtEnd(() => turn.append(problem(answer.fault, () => { turn.remove(); answerLast(); })));
  }
}

function fitMessage() {
  const box = $("message");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

function setUpChat() {
  for (const sample of SAMPLES) {
    const button = make("button", { type: "button" }, sample);
    button.addEventListener("click", () => chat(sample));
    $("samples").append(button);
  }
  $("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (isRunning("send")) {
      stop();
      return;
    }
    const text = $("message").value;
    if (!text.trim()) return;
    // A question that got no answer is asked anew with the next one.
    if (messages.at(-1)?.role === "user") messages.pop();
    $("message").value = "";
    fitMessage();
    chat(text);
  });
  $("message").addEventListener("input", fitMessage);
  $("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!isRunning("send")) $("chat-form").requestSubmit();
    }
  });
  $("clear").addEventListener("click", () => {
    stop();
    messages.length = 0;
    $("turns").replaceChildren();
    $("welcome").hidden = false;
    $("clear").hidden = true;
    $("message").focus();
  });
}

// ---- infilling

const GAP = /\{\{gap(?::(\d+))?\}\}/;
const EXAMPLE = "def mean(numbers):\n    total = {{gap:8}}\n    return total / {{gap:6}}\n";

/** The text around the gaps, and the length of each: null where it is not known. */
function readGaps(text) {
  const parts = text.split(new RegExp(GAP, "g"));
  const pieces = parts.filter((_, i) => i % 2 === 0);
  const lengths = parts.filter((_, i) => i % 2 === 1).map((length) => (length ? Number(length) : null));
  return { pieces, lengths };
}

function countGaps() {
  const { lengths } = readGaps($("text").value);
  const isAuto = lengths.includes(null);
  const searched = lengths.length === 1 ? "its length is searched" : "their lengths are searched";
  const known = isAuto ? searched : `${plural(lengths.reduce((a, b) => a + b, 0), "token")} to fill`;
  $("gap-count").textContent = lengths.length ? `${plural(lengths.length, "gap")}, ${known}` : "No gap yet";
  if (!isRunning("fill")) $("fill").disabled = lengths.length === 0;
}

async function fill() {
  const { pieces, lengths } = readGaps($("text").value);
  const isAuto = lengths.includes(null);
  const { max_tokens: most, ...rest } = settings();
  const body = { infill: { pieces, lengths: isAuto ? "auto" : lengths }, ...rest };
  if (isAuto && most !== undefined) body.max_tokens = most;
  const answer = new Answer({
    before: pieces[0], after: pieces.at(-1), waiting: isAuto ? "Searching for the best length" : undefined,
  });
  $("filled").replaceChildren(answer.element);
  $("filled").scrollIntoView({ block: "nearest" });
  const isGiven = await stream("v1/completions", body, answer, $("fill"), false);
  countGaps();
  if (!isGiven && answer.element.isConnected) {
    const box = problem(answer.fault, fill);
    if (answer.cells.length) $("filled").append(box);
    else $("filled").replaceChildren(box);
  }
}

function setUpInfill() {
  $("text").value = EXAMPLE;
  $("text").addEventListener("input", countGaps);
  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !isRunning("fill")) $("infill-form").requestSubmit();
  });
  $("insert-gap").addEventListener("click", () => {
    const box = $("text");
    box.setRangeText("{{gap}}", box.selectionStart, box.selectionEnd, "end");
    box.focus();
    countGaps();
  });
  $("infill-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (isRunning("fill")) stop();
    else fill();
  });
  countGaps();
}

// ---- settings, as the server's OpenAPI document and its model card publish them

const GROUPS = {
  exact: "",
  lossless: "Speculation, same tokens",
  cached: "Cache, approximate",
  parallel: "Parallel commits, approximate",
  remasking: "Remasking",
};
const MORE = ["eps", "logit_bias", "suppress_tokens", "repetition_penalty", "presence_penalty", "frequency_penalty"];

function field(name, kind, says, shown) {
  const id = `set-${name}`;
  let input;
  if (kind.enum) {
    input = make("select", { id }, make("option", { value: "" }, `default (${shown})`));
    input.append(...kind.enum.map((value) => make("option", { value }, value)));
  } else {
    input = make("input", { id, placeholder: shown, spellcheck: false });
    if (kind.isNumber) input.inputMode = "decimal";
  }
  const words = says.split("`").map((part, i) => (i % 2 ? make("code", {}, part) : part));
  const help = make("p", { className: "help", id: `${id}-help` }, ...words);
  input.name = name;
  input.setAttribute("aria-describedby", help.id);
  return make("div", { className: "setting" }, make("label", { htmlFor: id }, name), input, help);
}

/** The kinds of value that a schema allows, as one field takes them. */
function kindOf(schema) {
  const choices = (schema.anyOf ?? [schema]).filter((choice) => choice.type !== "null");
  const words = choices.flatMap((choice) => choice.enum ?? (choice.const !== undefined ? [choice.const] : []));
  const isNumber = choices.some((choice) => choice.type === "integer" || choice.type === "number");
  const isOpen = isNumber || choices.some((choice) => choice.type === "object" || choice.type === "array");
  if (choices.some((choice) => choice.type === "boolean")) return { enum: ["true", "false"] };
  return { enum: isOpen ? null : [...new Set(words)], isNumber };
}

function listSettings(schema, defaults) {
  const form = $("fields");
  const groups = new Map();
  const group = (title) => {
    if (!title) return form;
    if (!groups.has(title)) groups.set(title, make("details", {}, make("summary", {}, title)));
    return groups.get(title);
  };
  form.replaceChildren(
    make("div", { className: "setting" },
      make("label", { htmlFor: "system" }, "System message"),
      make("textarea", { id: "system", rows: 2, placeholder: "none" })),
  );
  for (const [name, about] of Object.entries(schema.properties)) {
    const regime = about["x-regime"];
    if (!regime) continue;
    const value = defaults[name];
    const shown = value === null || value === undefined ? "none" : typeof value === "object" ? JSON.stringify(value) : String(value);
    group(MORE.includes(name) ? "Tokens" : GROUPS[regime] ?? regime).append(field(name, kindOf(about), about.description, shown));
    if (name === "temperature") {
      form.append(field("seed", { isNumber: true }, "start of the draws; the same seed gives the same answer", "server's"));
    }
  }
  for (const details of groups.values()) form.append(details);
  form.addEventListener("input", markChanged);
}

function inputs() { return [...$("fields").querySelectorAll("[name]")]; }

function markChanged(event) {
  event?.target.removeAttribute("aria-invalid");
  for (const input of inputs()) input.closest(".setting").classList.toggle("changed", input.value.trim() !== "");
  $("reset").disabled = !inputs().some((input) => input.value.trim() !== "");
}

function markField(name) {
  const input = inputs().find((one) => one.name === name);
  if (!input) return;
  input.setAttribute("aria-invalid", "true");
  const details = input.closest("details");
  if (details) details.open = true;
}

/** What the request says of the settings: only what was changed. What is no number goes as it is, and is refused. */
function settings() {
  const given = {};
  for (const input of inputs()) {
    const text = input.value.trim();
    if (!text) continue;
    try {
      const value = JSON.parse(text);
      given[input.name] = typeof value === "number" && Math.abs(value) > Number.MAX_SAFE_INTEGER ? text : value;
    } catch {
      given[input.name] = text;
    }
  }
  return given;
}

function showSettings(isOpen) {
  $("settings").classList.toggle("open", isOpen);
  $("open-settings").setAttribute("aria-expanded", String(isOpen));
  document.querySelector("main").inert = isOpen;
  document.querySelector(".bar").inert = isOpen;
  (isOpen ? $("close-settings") : $("open-settings")).focus();
}

// ---- the page

function askForKey(fault) {
  $("key-form").hidden = false;
  $("key-fault").textContent = fault;
  $("key").focus();
}

const THEMES = ["system", "light", "dark"];

function setTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  localStorage.setItem("coda-theme", theme);
  $("theme").setAttribute("aria-label", `Theme: ${theme}`);
  $("theme").title = `Theme: ${theme}`;
}

function choose(name) {
  for (const other of ["chat", "infill"]) {
    const isChosen = other === name;
    const tab = $(`tab-${other}`);
    tab.setAttribute("aria-selected", String(isChosen));
    tab.tabIndex = isChosen ? 0 : -1;
    $(other).hidden = !isChosen;
  }
}

async function connect() {
  const dot = document.querySelector(".dot");
  try {
    const [cards, about] = await Promise.all([ask("v1/models"), ask("openapi.json")]);
    const card = (await cards.json()).data[0];
    const schema = (await about.json()).paths["/v1/chat/completions"].post.requestBody.content["application/json"].schema;
    $("model-name").textContent = card.id;
    $("model-name").title = `${card.id}, ${card.max_model_len} tokens of context, attention ${card.attention}`;
    dot.dataset.state = "ok";
    $("key-form").hidden = true;
    if (!inputs().length) listSettings(schema, card.defaults);
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    dot.dataset.state = "bad";
    $("model-name").textContent = error.status === 401 ? "Key needed" : "Not connected";
    $("fields").replaceChildren(make("p", { className: "help" }, error.status === 401 ? "They come with the key." : error.message));
    if (error.status !== 401) setTimeout(connect, 3000);
  }
}

function start() {
  setTheme(localStorage.getItem("coda-theme") ?? "system");
  for (const cell of document.querySelectorAll("[data-p]")) cell.style.setProperty("--p", cell.dataset.p);
  $("theme").addEventListener("click", () => {
    const now = document.documentElement.dataset.theme ?? "system";
    setTheme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
  });
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const name = tab.id.slice(4);
    tab.addEventListener("click", () => choose(name));
    tab.addEventListener("keydown", (event) => {
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      const other = name === "chat" ? "infill" : "chat";
      choose(other);
      $(`tab-${other}`).focus();
    });
  }
  $("open-settings").addEventListener("click", () => showSettings(true));
  $("close-settings").addEventListener("click", () => showSettings(false));
  $("reset").addEventListener("click", () => {
    for (const input of inputs()) {
      input.value = "";
      input.removeAttribute("aria-invalid");
    }
    markChanged();
  });
  $("fields").addEventListener("submit", (event) => event.preventDefault());
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    key = $("key").value.trim();
    sessionStorage.setItem("coda-key", key);
    connect();
  });
  // Open is what covers a narrow page: a wider one shows the settings beside.
  const isOpen = () => $("settings").classList.contains("open");
  matchMedia("(max-width: 900px)").addEventListener("change", () => { if (isOpen()) showSettings(false); });
  document.addEventListener("pointerdown", (event) => {
    if (isOpen() && !$("settings").contains(event.target)) showSettings(false);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if (isOpen()) showSettings(false);
    else stop();
  });
  setUpChat();
  setUpInfill();
  connect();
}

start();
