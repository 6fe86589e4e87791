"use strict";
// Shared by all views: the data, the state, and helpers to create elements.

const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = document.getElementById("svg").namespaceURI;
const T = DATA.tokens.length;

// The state: the selected token, whether it is locked, the enlarged head, and the settings of the views.
const state = { tok: T - 1, locked: false, head: null, lens: "p", dla: "logit", bars: "largest", turn: "from" };
const watchers = [];

function set(change) {
  const before = { ...state };
  Object.assign(state, change);
  if (Object.keys(change).every((key) => before[key] === state[key])) return;
  for (const watch of watchers) watch(before);
  writeHash();
}

// State in the URL: #tok=17&head=L1H3
function writeHash() {
  const kept = { tok: state.locked ? state.tok : null, head: state.head, lens: state.lens, dla: state.dla };
  const hash = Object.entries(kept).filter(([, v]) => v !== null).map(([k, v]) => `${k}=${v}`).join("&");
  try { history.replaceState(null, "", `#${hash}`); } catch { /* a frame without a URL */ }
}

function readHash() {
  const given = new URLSearchParams(location.hash.slice(1)), change = {};
  const tok = Number(given.get("tok"));
  if (given.get("tok") && Number.isInteger(tok) && tok >= 0 && tok < T) Object.assign(change, { tok, locked: true });
  const allowed = { head: Object.keys(DATA.attn?.badges ?? {}), lens: Object.keys(LENS_COLOURS), dla: ["logit", "rival"] };
  for (const [key, values] of Object.entries(allowed)) if (values.includes(given.get(key))) change[key] = given.get(key);
  return change;
}

// el("p", {class: "note", onclick: f, "--w": 0.5}, "text", child): strings become text, never markup.
function el(tag, props = {}, ...children) {
  const node = tag.startsWith("svg:") ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else if (value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const fill = (node, ...children) => node.replaceChildren(...children.filter((child) => child !== null));

// Unpack {kind, shape, data} to a typed array with a shape; entries with `root` store square roots.
const KINDS = { u8: Uint8Array, u16: Uint16Array, u32: Uint32Array, f32: Float32Array };

async function unpack(entry) {
  const bytes = Uint8Array.from(atob(entry.data), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  let values = new KINDS[entry.kind](await new Response(stream).arrayBuffer());
  if (entry.root) values = Float32Array.from(values, (v) => (v / entry.root) ** 2);
  return Object.assign(values, { shape: entry.shape });
}

async function unpackAll(object) { // unpack all nested arrays in place
  for (const [key, value] of Object.entries(object ?? {})) {
    if (value && typeof value === "object") {
      if ("kind" in value && "shape" in value) object[key] = await unpack(value);
      else await unpackAll(value);
    }
  }
}

// Formatting of tokens and numbers.

function visible(text) {
  const shown = text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "·");
  return shown.replace(/[\u0000-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0))) || "∅";
}
const piece = (id) => visible(DATA.pieces[id] ?? `<${id}>`);
const tokenAt = (t) => visible(DATA.tokens[t].s);
const token = (text) => el("span", { class: "tok" }, text);
const percent = (p) => (p >= 0.9995 ? "100%" : p >= 0.0995 ? `${(100 * p).toFixed(0)}%` : p >= 0.00095 ? `${(100 * p).toFixed(1)}%` : p > 0 ? "<0.1%" : "0");
const fixed = (v, digits = 2) => v.toFixed(digits).replace(/^-(0\.?0*)$/, "$1").replace("-", "−");
const signed = (v, digits = 2) => (v > 0 ? "+" : "") + fixed(v, digits);
const short = (v) => (v === 0 ? "0" : Math.abs(v) < 0.001 || Math.abs(v) >= 1e5 ? v.toExponential(1) : String(+v.toPrecision(3))).replace("-", "−");
const grouped = (v) => String(v).replace(/\B(?=(\d{3})+$)/g, "\u2009");

// Create a section with a title, a sentence of explanation, switches, and a button that copies its data.
function view(id, title, sentence, data, ...switches) {
  const body = el("div", { class: "body" });
  const copy = el("button", { class: "copy", type: "button", onclick: () => copyText(JSON.stringify(data(), plainArrays), copy) }, "copy data");
  document.getElementById("views").append(
    el("section", { id, "aria-label": title },
      el("div", { class: "top" }, el("h2", {}, title), copy),
      el("p", { class: "say" }, sentence),
      switches.length ? el("div", { class: "switches" }, ...switches) : null, body));
  return body;
}

const plainArrays = (key, value) => (ArrayBuffer.isView(value) ? { shape: value.shape, values: Array.from(value) } : value);

async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no permission for the clipboard
    const area = el("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.textContent = "copied";
  setTimeout(() => { button.textContent = "copy data"; }, 1200);
}

// A row of buttons with one selected: choices {value: label}, bound to a key of the state.
function chooser(key, choices, label) {
  const buttons = Object.entries(choices).map(([value, text]) => el("button", { type: "button", onclick: () => set({ [key]: value }) }, text));
  const show = () => buttons.forEach((button, i) => button.setAttribute("aria-pressed", Object.keys(choices)[i] === state[key]));
  watchers.push(show);
  show();
  return el("div", { class: "chooser", role: "group", "aria-label": label }, el("span", {}, label), ...buttons);
}

const fact = (name, value) => (value === undefined || value === null ? null : el("div", {}, el("dt", {}, name), el("dd", {}, value)));

// Hovering selects a token, a click locks the selection, a second click unlocks it.
const hover = (t) => { if (!state.locked) set({ tok: t }); };
const lock = (t) => set(state.locked && state.tok === t ? { locked: false } : { tok: t, locked: true });

// Horizontal bars for predictions: [[label, share, mark]].
function bars(rows) {
  const most = Math.max(...rows.map(([, p]) => p), 1e-9);
  return el("ol", { class: "bars" }, ...rows.map(([text, p, mark]) =>
    el("li", { class: mark ? "mark" : "" }, token(text), el("span", { class: "track" }, el("i", { "--w": p / most })), el("b", {}, percent(p)))));
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function rgb(name) {
  const probe = el("canvas", { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  probe.fillStyle = colour(name);
  probe.fillRect(0, 0, 1, 1);
  return probe.getImageData(0, 0, 1, 1).data;
}
