// The next token: the logits after each sampling processor, recomputed when the sliders move.

const SLIDERS = { // name: [label, min, max, step]
  temperature: ["temperature", 0, 2, 0.05], top_k: ["top-k", 0, 100, 1], top_p: ["top-p", 0, 1, 0.01], min_p: ["min-p", 0, 1, 0.01],
  typical_p: ["typical", 0.01, 1, 0.01], repetition_penalty: ["repetition penalty", 0.5, 2, 0.01],
  presence_penalty: ["presence penalty", -2, 2, 0.05], frequency_penalty: ["frequency penalty", -2, 2, 0.05],
  smoothing_factor: ["smoothing", 0, 2, 0.05], smoothing_curve: ["smoothing curve", 1, 3, 0.05],
  dynatemp_range: ["dynamic range", 0, 2, 0.05], dynatemp_exponent: ["dynamic exponent", 0, 3, 0.05], top_h: ["top-h", 0.01, 1, 0.01],
  epsilon_cutoff: ["epsilon", 0, 0.2, 0.001], eta_cutoff: ["eta", 0, 0.2, 0.001], top_a: ["top-a", 0, 1, 0.01],
  tail_free: ["tail-free", 0, 1, 0.01], top_n_sigma: ["top-n-sigma", 0, 5, 0.05], p_less: ["p-less", 0, 1, 1],
};
const FIRST_SLIDERS = 6, CANDIDATES = 12;
const label = (name) => SLIDERS[name]?.[0] ?? name;

// The logits as input of the sampling steps: tokens sorted by id, groups at the end.
function entriesOf({ ids, logits, groups, history }) {
  const seen = new Map();
  for (const id of history) seen.set(id, (seen.get(id) ?? 0) + 1);
  const each = Array.from(ids, (id, i) => ({ id, z: logits[i], n: 1, count: seen.get(id) ?? 0 })).sort((a, b) => a.id - b.id);
  for (const [n, z] of groups) each.push({ id: null, z, n, count: 0 });
  const all = (key) => each.map((entry) => entry[key]);
  return { ids: all("id"), z: all("z"), n: all("n"), counts: all("count") };
}

function nextView(next) {
  const entries = entriesOf(next), params = { ...next.params };
  let order = next.order;
  const body = view("next", "The next token",
    "The next-token distribution after the last token, through the sampling processors, one per column. The sliders change the settings.",
    () => ({ params, order, stages: compute().map(({ name, possible, entropy, kl, p }) => ({ name, possible, entropy, kl, p: p.map((v, i) => [entries.ids[i], v]).filter(([, v]) => v > 0) })) }));
  const compute = () => stagesOf(entries, params, next.orders[order], next.off, entries);
  const outputs = {};
  const slider = (name) => {
    const [text, least, most, step] = SLIDERS[name];
    const write = () => {
      outputs[name].textContent = Number(params[name]) === Number(next.off[name]) && name !== "temperature" ? "off" : short(Number(params[name]));
      input.closest("label").classList.toggle("off", !active(name));
    };
    const input = el("input", { type: "range", min: least, max: Math.max(most, Number(params[name])), step, name, oninput: () => {
      params[name] = name === "p_less" ? input.value === "1" : Number(input.value);
      write();
      show();
    } });
    outputs[name] = el("output");
    const node = el("label", {}, el("span", {}, text), outputs[name], input);
    input.reset = () => { params[name] = next.params[name]; input.value = Number(params[name]); write(); };
    input.reset();
    return node;
  };
  const active = (name) => isOn(name, params, next.off);
  const names = Object.keys(SLIDERS);
  const more = el("details", {}, el("summary", {}, "more"), ...names.slice(FIRST_SLIDERS).map(slider));
  more.open = names.slice(FIRST_SLIDERS).some((name) => !["smoothing_curve", "dynatemp_exponent"].includes(name) && active(name));
  const orders = el("select", { "aria-label": "order", onchange: () => { order = orders.value; show(); } },
    ...Object.keys(next.orders).map((name) => el("option", { value: name }, name)));
  orders.value = order;
  const controls = el("form", { class: "controls", onsubmit: (event) => event.preventDefault() },
    ...names.slice(0, FIRST_SLIDERS).map(slider), more, el("label", { class: "order" }, el("span", {}, "order"), orders),
    el("button", { type: "button", onclick: () => {
      for (const input of controls.querySelectorAll("input")) input.reset();
      orders.value = order = next.order;
      show();
    } }, "reset to the run's settings"));
  const table = el("table", { class: "waterfall" }), note = el("p", { class: "note" });
  body.append(el("div", { class: "split left" }, controls, el("div", {}, el("div", { class: "scroll" }, table), note)));

  function show() {
    const stages = compute(), last = stages[stages.length - 1];
    const likeliest = (stage) => ranking(stage.p).filter((i) => entries.ids[i] !== null && stage.p[i] > 0).slice(0, CANDIDATES);
    const shown = [...new Set([...likeliest(last), ...likeliest(stages[0])])].slice(0, CANDIDATES + 6);
    const most = Math.max(...stages.map(({ p }) => Math.max(...p)));
    const line = (name, of) => el("tr", {}, el("th", { scope: "row" }, name), ...stages.map((stage, i) => el("td", {}, of(stage, i))));
    fill(table,
      el("thead", {}, el("tr", {}, el("th"), ...stages.map(({ name }) => el("th", { scope: "col" }, label(name))))),
      el("tbody", {}, ...shown.map((i) => el("tr", {}, el("th", { scope: "row" }, token(piece(entries.ids[i]))), ...stages.map(({ p }) =>
        p[i] > 0 ? el("td", {}, el("i", { "--w": p[i] / most }), el("span", {}, percent(p[i]))) : el("td", { class: "gone" }, "–"))))),
      el("tfoot", {}, line("possible", ({ possible }) => grouped(possible)),
        line("removed mass", ({ lost }, i) => (i ? percent(lost) : "")), line("entropy", ({ entropy }) => fixed(entropy)),
        line("KL from model", ({ kl }, i) => (i ? fixed(Math.max(0, kl)) : ""))));
    const groupsNote = next.groups.length ? ` Tokens beyond the ${grouped(next.ids.length)} most likely are merged into ${next.groups.length} groups.` : "";
    const othersNote = next.others.length ? ` The run also sets ${next.others.join(", ")}, which this page ignores.` : "";
    note.textContent = `Entropy and KL divergence in nats. Penalties count every token of the text.${groupsNote}${othersNote}`;
  }
  show();
}
