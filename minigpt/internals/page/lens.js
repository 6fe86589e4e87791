// The lens: what the stream would say if it were read after each component.

const LENS_COLOURS = { p: "probability", entropy: "entropy", kl: "distance", rank: "rank" };

const LENSES = {
  logit: ["Logit lens", "its stream is read through the final norm and the unembedding"],
  tuned: ["Tuned lens", "its stream is first translated by a map that was trained for that place, then read"],
  jacobian: ["Jacobian lens", "its stream is first carried to the end by the mean derivative, then read"],
};

function lensView(lens, kind) {
  const [title, how] = LENSES[kind], { rows } = lens, k = lens.ids.shape[2], cell = (r, t) => r * T + t;
  const mostKl = Math.max(1e-9, ...lens.kl), mostEntropy = Math.max(1e-9, ...lens.entropy), size = DATA.model?.vocab ?? 1e5;
  const shade = { // 0 .. 1, dark is sure, near to the end, or right
    p: (i) => lens.p[i * k], entropy: (i) => 1 - lens.entropy[i] / mostEntropy,
    kl: (i) => 1 - lens.kl[i] / mostKl, rank: (i) => 1 - Math.min(1, Math.log(lens.rank[i]) / Math.log(size)),
  };
  const meaning = {
    p: "Stronger: the token shown is likelier.", entropy: "Stronger: the prediction is surer (lower entropy).",
    kl: "Stronger: nearer to the model's final prediction (lower KL divergence).", rank: "Stronger: the token that truly follows stands higher.",
  };
  const body = view(kind === "logit" ? "lens" : `lens-${kind}`, title,
    `What the model would say next if it stopped after each component: ${how}. The last row is the model's prediction.`,
    () => ({ rows, ...lens }), chooser("lens", LENS_COLOURS, "Shade by"));
  let row = rows.length - 1;
  const cells = rows.map((_, r) => DATA.tokens.map((_, t) => el("td", {
    onpointerenter: () => { row = r; hover(t); detail(r, t); }, onclick: () => { lock(t); detail(r, t); },
    class: t < T - 1 && lens.ids[cell(r, t) * k] === lens.target[t] ? "right" : "",
  }, piece(lens.ids[cell(r, t) * k]))));
  const heads = DATA.tokens.map((_, t) => el("th", { scope: "col", onpointerenter: () => hover(t), onclick: () => lock(t) }, tokenAt(t)));
  const feet = lens.target.map((id, t) => el("td", { onpointerenter: () => hover(t), onclick: () => lock(t) }, t < T - 1 ? piece(id) : "?"));
  const table = el("table", { class: "lens" },
    el("thead", {}, el("tr", {}, el("th", {}, "after"), ...heads)),
    el("tbody", {}, ...rows.map((name, r) => el("tr", {}, el("th", { scope: "row" }, name), ...cells[r]))),
    el("tfoot", {}, el("tr", {}, el("th", { scope: "row" }, "next token"), ...feet)));
  const scroll = el("div", { class: "scroll" }, table), note = el("p", { class: "note" }), panel = el("aside", { class: "panel" });
  body.append(el("div", { class: "split" }, el("div", {}, scroll, note), panel));

  function detail(r, t) {
    const i = cell(r, t);
    const list = Array.from({ length: k }, (_, j) => [piece(lens.ids[i * k + j]), lens.p[i * k + j], lens.ids[i * k + j] === lens.target[t]]);
    fill(panel, el("h3", {}, `after ${rows[r]}`, el("small", {}, "at ", token(tokenAt(t)), ` (${t})`)),
      el("dl", { class: "facts" },
        fact(t < T - 1 ? "next token" : "likeliest", token(piece(lens.target[t]))), fact("its rank", grouped(lens.rank[i])),
        fact("entropy", `${fixed(lens.entropy[i])} nats`), fact("KL from the end", `${fixed(lens.kl[i])} nats`)),
      el("h4", {}, "Expected next"), bars(list));
  }
  function show(before) {
    if (!before || before.lens !== state.lens) {
      cells.forEach((line, r) => line.forEach((node, t) => node.style.setProperty("--w", Math.max(0, shade[state.lens](cell(r, t))).toFixed(3))));
      note.textContent = `${meaning[state.lens]} Underlined: the token shown is the one that follows.`;
    }
    for (const line of [heads, feet, ...cells]) {
      if (before) line[before.tok].classList.remove("on");
      line[state.tok].classList.add("on");
    }
    const box = scroll.getBoundingClientRect(), head = heads[state.tok].getBoundingClientRect();
    if (box.width && (head.left < box.left + 90 || head.right > box.right)) scroll.scrollLeft += head.left - box.left - box.width / 2;
    detail(row, state.tok);
  }
  watchers.push(show);
  show();
}
