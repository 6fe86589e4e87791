// Header, navigation bar, keyboard shortcuts and start-up.

function headView() {
  const m = DATA.model;
  const size = m.params >= 1e6 ? `${(m.params / 1e6).toPrecision(3)} M` : `${(m.params / 1e3).toPrecision(3)} k`;
  const groups = m.n_kv_head !== m.n_head ? ` (${m.n_kv_head} key/value)` : "";
  document.getElementById("head").append(
    el("h1", {}, DATA.title),
    el("p", { class: "say" }, `A ${m.preset} GPT with ${size} parameters on a text of ${T === 1 ? "one token" : `${T} tokens`}.`),
    el("dl", { class: "card" },
      fact("layers", m.n_layer), fact("heads", `${m.n_head}${groups}`), fact("channels", m.n_embd), fact("context", m.block_size),
      fact("vocabulary", `${grouped(m.vocab)}${m.tokenizer ? ` · ${m.tokenizer}` : ""}`), fact("parts", `${m.norm}, ${m.position}, ${m.activation}`),
      fact("data", m.data), fact("step", m.step === undefined ? null : grouped(m.step)), fact("validation loss", m.val_loss === undefined ? null : fixed(m.val_loss, 3))));
}

function barView() {
  const links = [...document.querySelectorAll("main > section")].map((section) => el("a", { href: `#${section.id}`, onclick: (event) => {
    event.preventDefault(); // the URL fragment holds the state
    section.scrollIntoView({ behavior: "smooth" });
  } }, section.querySelector("h2").textContent));
  const step = (by) => () => move(by), here = el("span", { class: "here" });
  document.getElementById("bar").append(el("div", { class: "links" }, ...links), el("div", { class: "stand" },
    el("button", { type: "button", "aria-label": "previous token", onclick: step(-1) }, "‹"), here, el("button", { type: "button", "aria-label": "next token", onclick: step(1) }, "›")));
  const show = () => {
    fill(here, el("small", {}, String(state.tok)), token(tokenAt(state.tok)), el("small", { class: "held" }, state.locked ? "locked" : ""));
    document.body.classList.toggle("locked", state.locked);
  };
  watchers.push(show);
  show();
}

function move(by) {
  set({ tok: Math.min(T - 1, Math.max(0, state.tok + by)), locked: true });
}

function turnHead(layers, heads) {
  const { L, H } = DATA.attn, [, l, h] = state.head.match(/L(\d+)H(\d+)/).map(Number);
  set({ head: `L${(l + layers + L) % L}H${(h + heads + H) % H}` });
}

function keys(event) {
  if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  const turns = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  if (event.shiftKey && turns[event.key] && DATA.attn) turnHead(...turns[event.key]);
  else if (event.key === "ArrowLeft") move(-1);
  else if (event.key === "ArrowRight") move(1);
  else if (event.key === "Escape") set({ locked: false });
  else return;
  event.preventDefault();
}

async function start() {
  await unpackAll({ ...DATA, tokens: null, pieces: null });
  Object.assign(state, readHash());
  headView();
  if (DATA.tokens) tokensView(DATA.loss);
  if (DATA.attn) attentionView(DATA.attn);
  for (const [kind, lens] of Object.entries(DATA.lens?.kinds ?? {})) lensView(lens, kind);
  if (DATA.dla) attributionView(DATA.dla);
  if (DATA.next) nextView(DATA.next);
  (DATA.grids ?? []).forEach(gridView);
  if (DATA.runs) trainingView(DATA.runs);
  barView();
  const missing = Object.entries(DATA.missing ?? {}).map(([name, reason]) => el("p", { class: "note" }, `Left out: ${name} (${reason})`));
  fill(document.getElementById("foot"), ...missing, el("p", {}, "Hover to select a token, click to lock it. ", el("kbd", {}, "←"), " ", el("kbd", {}, "→"), ": token, ",
    el("kbd", {}, "Shift"), " + arrows: head and layer, ", el("kbd", {}, "Esc"), ": unlock. The URL stores the selection. Made by minigpt."));
  document.addEventListener("keydown", keys);
  addEventListener("hashchange", () => set(readHash()));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => set({ theme: event.matches }));
  document.documentElement.dataset.ready = "yes";
}

start();
