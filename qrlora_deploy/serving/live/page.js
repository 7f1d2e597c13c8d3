"use strict";

// The numbers of /live.json, drawn. Nothing is kept: neither in the browser nor, of the key, longer than the page.

const HISTORY_S = 300;
const PATIENCE_MS = 5000;
const FIRST_PAUSE_MS = 2000;

const REASONS = {
  overloaded: "the queue, or a customer's share of it, was full",
  quota: "a customer's quota was used up",
  deadline: "the time that the client gave had passed",
  not_ready: "the server started or ended",
  unknown_customer: "no such customer, or not for this key",
  not_found: "no such model",
  unauthenticated: "no key, or none that is known",
  malformed_input: "the request was malformed",
  too_large: "too large",
  slow: "the client was too slow",
  gone: "the client did not wait",
  invalid: "a customer's file cannot be used",
  bad_file: "a customer's file cannot be used",
  mismatch: "a customer's file is for another bundle",
  failed: "the server failed; its log says why",
};

const count = value => value == null ? "–" : Math.round(value).toLocaleString("en");
const rate = value => value == null ? "–" : value < 10 ? value.toFixed(value ? 1 : 0) : count(value);
const share = value => value == null ? "–" : `${Math.round(100 * value)} %`;
const time = value => {
  if (value == null) return "–";
  return value && value < 9.95 ? `${value.toFixed(1)} ms` : value < 9995 ? `${count(value)} ms` : `${(value / 1000).toFixed(1)} s`;
};

const TILES = [
  ["Requests a second", "requests_s", rate],
  ["Rows a second", "rows_s", rate],
  ["Latency, p50", "p50_ms", time],
  ["Latency, p99", "p99_ms", time],
  ["Rows waiting", "queued_rows", count],
  ["Rows a batch", "rows_a_batch", rate],
  ["Engine busy", "busy", share],
  ["Refused a second", "refused_s", rate],
];

// Title, what the numbers are, and the curves: the name in the history and on the page.
const CHARTS = [
  ["Requests a second", rate, [["requests_s", "answered"], ["refused_s", "refused"]]],
  ["Latency", time, [["p50_ms", "p50"], ["p99_ms", "p99"]]],
  ["Rows a second", rate, [["rows_s", "rows"]]],
  ["Wait in the queue", time, [["queue_p50_ms", "p50"], ["queue_p99_ms", "p99"]]],
  ["Rows waiting", count, [["queued_rows", "rows"]]],
  ["Fill: rows a batch", rate, [["rows_a_batch", "rows"]]],
  ["Swaps: customers in and out of the table", count, [["loads", "loaded"], ["evictions", "evicted"]]],
  ["Engine busy", share, [["busy", "of the time"]]],
  ["Tokens that are no padding", share, [["text_share", "of all"]]],
];

const byId = id => document.getElementById(id);

function make(name, attributes = {}, ...children) {
  const isSvg = ["svg", "path", "line", "text"].includes(name);
  const element = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// The end of an axis: a round number that is not below `value`, nor below what can be told from its half.
function ceiling(value, show) {
  const least = show === count ? 2 : show === share ? 1 : 0.2;
  if (!(value > least)) return least;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 6, 8, 10].map(step => step * power).find(step => step >= value * 0.999);
}

class Chart {
  constructor(title, show, curves) {
    Object.assign(this, { title, show, curves, cursor: null, ages: [], values: curves.map(() => []) });
    this.legend = make("span", { class: "legend" });
    this.svg = make("svg", { role: "img", tabindex: "0" });
    this.figure = make("figure", {}, make("figcaption", {}, make("strong", {}, title), this.legend), this.svg);
    this.svg.addEventListener("pointermove", event => this.point(event.offsetX));
    this.svg.addEventListener("pointerleave", () => this.move(null));
    this.svg.addEventListener("blur", () => this.move(null));
    this.svg.addEventListener("keydown", event => this.press(event));
  }

  update(history) {
    this.ages = history.age_s || [];
    this.values = this.curves.map(([name]) => history[name] || []);
    this.draw();
  }

  press(event) {
    const last = this.ages.length - 1;
    const places = { ArrowLeft: (this.cursor ?? last + 1) - 1, ArrowRight: (this.cursor ?? last) + 1, Home: 0, End: last };
    if (!(event.key in places) || last < 0) return;
    event.preventDefault();
    this.move(Math.max(0, Math.min(last, places[event.key])));
  }

  point(x) {
    const age = HISTORY_S * (1 - (x - this.left) / (this.width - this.left));
    const distances = this.ages.map(other => Math.abs(other - age));
    this.move(distances.length ? distances.indexOf(Math.min(...distances)) : null);
  }

  move(cursor) {
    this.cursor = cursor;
    this.draw();
  }

  draw() {
    this.width = this.svg.clientWidth || 320;
    this.height = this.svg.clientHeight || 136;
    const numbers = this.values.flat().filter(value => value != null);
    const top = ceiling(Math.max(0, ...numbers), this.show);
    this.left = 10 + 6.8 * Math.max(...[0, top / 2, top].map(value => this.show(value).length));
    this.bottom = this.height - 20;
    this.y = value => this.bottom - value / top * (this.bottom - 8);
    this.x = age => this.left + (1 - Math.min(1, age / HISTORY_S)) * (this.width - this.left - 4);
    this.svg.replaceChildren(...this.frame(top), ...this.areas(), ...this.lines(), ...this.cursorLine());
    this.tell();
  }

  frame(top) {
    const parts = [0, top / 2, top].flatMap(value => [
      make("line", { class: "grid", x1: this.left, x2: this.width, y1: this.y(value), y2: this.y(value) }),
      make("text", { x: this.left - 6, y: this.y(value) + 4, "text-anchor": "end" }, this.show(value)),
    ]);
    const times = [[this.left, "start", "5 min ago"], [this.width - 2, "end", "now"]];
    const labels = times.map(([x, anchor, text]) => make("text", { x, y: this.height - 4, "text-anchor": anchor }, text));
    return [...parts, ...labels];
  }

  // Pieces of a curve, each without a gap: a step in which nothing happened has no percentile.
  pieces(values) {
    const found = [[]];
    values.forEach((value, index) => {
      if (value == null) found.push([]);
      else found.at(-1).push([this.x(this.ages[index]), this.y(value)]);
    });
    return found.filter(piece => piece.length);
  }

  path(points) {
    const places = points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`);
    return `M${places[0]}${places.length > 1 ? places.slice(1).map(place => `L${place}`).join("") : "h0.01"}`;
  }

  areas() {
    return this.pieces(this.values[0]).map(points => {
      const [from, to] = [points[0][0].toFixed(1), points.at(-1)[0].toFixed(1)];
      return make("path", { class: "area", d: `${this.path(points)}L${to} ${this.bottom}L${from} ${this.bottom}Z` });
    });
  }

  lines() {
    return this.values.flatMap((values, number) => this.pieces(values).map(points =>
      make("path", { class: `curve ${number ? "second" : "first"}`, d: this.path(points) })));
  }

  cursorLine() {
    if (this.cursor == null || this.cursor >= this.ages.length) return [];
    const x = this.x(this.ages[this.cursor]);
    return [make("line", { class: "cursor", x1: x, x2: x, y1: 4, y2: this.bottom })];
  }

  // What stands beside the title, and what a screen reader says: the last values, or those under the cursor.
  tell() {
    const at = this.cursor == null || this.cursor >= this.ages.length ? this.ages.length - 1 : this.cursor;
    const when = this.cursor == null || at < 0 ? "now" : `${Math.round(this.ages[at])} s ago`;
    const parts = this.curves.map(([, name], number) => [name, at < 0 ? "–" : this.show(this.values[number][at])]);
    this.legend.replaceChildren(...parts.map(([name, value], number) => make(
      "span", { class: number ? "second" : "first" }, make("i"), `${name} `, make("b", {}, value))));
    if (this.cursor != null) this.legend.append(make("span", {}, when));
    const label = `${this.title}, ${when}: ${parts.map(part => part.join(" ")).join(", ")}`;
    if (this.svg.getAttribute("aria-label") !== label) this.svg.setAttribute("aria-label", label);
  }
}

const charts = CHARTS.map(chart => new Chart(...chart));
let key = "";
let paused = false;
let lastAnswer = null;
let timer = 0;

function forHumans(seconds) {
  const [days, hours, minutes] = [seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60].map(Math.floor);
  return days ? `${days} d ${hours} h` : hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min` : `${Math.floor(seconds)} s`;
}

function setState(state, text = state) {
  if (byId("state").dataset.state === state && byId("state").textContent === text) return;
  byId("state").dataset.state = state;
  byId("state").textContent = text;
}

function row(name, cells) {
  return make("tr", {}, make("th", { scope: "row" }, name), ...cells.map(cell => make("td", {}, cell)));
}

function show(numbers) {
  byId("main").hidden = false;
  byId("version").textContent = numbers.version;
  byId("uptime").textContent = forHumans(numbers.uptime_s);
  setState(numbers.state, { ready: "ready", draining: "ending", starting: "starting" }[numbers.state]);
  byId("covered").textContent = numbers.seconds >= 55 ? "minute" : `${Math.round(numbers.seconds)} seconds`;
  byId("now").replaceChildren(...TILES.map(([name, field, text]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, text(numbers.now[field])))));
  charts.forEach(chart => chart.update(numbers.history));
  byId("models").replaceChildren(...numbers.models.map(model => row(model.name, [
    model.ready ? "ready" : "not ready", rate(model.rows_s), count(model.queued_rows), rate(model.rows_a_batch),
    share(model.busy), count(model.resident), count(model.loads), count(model.evictions),
  ])));
  const refused = Object.entries(numbers.refused).sort((one, other) => other[1] - one[1]);
  byId("refused").replaceChildren(...refused.map(([reason, times]) => row(REASONS[reason] || reason, [count(times)])));
  byId("refused").closest("table").hidden = !refused.length;
  byId("none-refused").hidden = refused.length > 0;
}

function trouble(text) {
  document.body.classList.toggle("stale", Boolean(text));
  byId("trouble").hidden = !text;
  if (byId("trouble").textContent !== text) byId("trouble").textContent = text;
}

function askForKey() {
  const wasAsked = !byId("key-form").hidden;
  byId("key-form").hidden = false;
  byId("main").hidden = true;
  setState("locked", "a key is needed");
  trouble(key ? "This key is not known, or has expired." : "");
  key = "";
  if (!wasAsked) byId("key").focus();
}

async function ask() {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const reply = await fetch("/live.json", { headers, cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
  if (reply.status === 401) return askForKey();
  if (!reply.ok) throw new Error(`the server answers by ${reply.status}`);
  const numbers = await reply.json();
  byId("key-form").hidden = true;
  lastAnswer = new Date();
  trouble("");
  show(numbers);
  return schedule(1000 * numbers.step_s);
}

async function tick() {
  try {
    await ask();
  } catch (error) {
    setState("silent", "no answer");
    const since = lastAnswer ? `since ${lastAnswer.toLocaleTimeString()}; what is below is from then` : "yet";
    trouble(`The server has given no answer ${since}. Trying again.`);
    schedule(FIRST_PAUSE_MS);
  }
}

function schedule(milliseconds) {
  clearTimeout(timer);
  if (!paused && !document.hidden && byId("key-form").hidden) timer = setTimeout(tick, milliseconds);
}

byId("key-form").addEventListener("submit", event => {
  event.preventDefault();
  key = byId("key").value.trim();
  byId("key").value = "";
  tick();
});
byId("pause").addEventListener("click", () => {
  paused = !paused;
  byId("pause").setAttribute("aria-pressed", String(paused));
  schedule(0);
});
document.addEventListener("visibilitychange", () => schedule(0));
new ResizeObserver(() => charts.forEach(chart => chart.draw())).observe(byId("charts"));
byId("charts").append(...charts.map(chart => chart.figure));
tick();
