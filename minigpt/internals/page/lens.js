// The lens: the prediction read from the residual stream after each component.

const LENS_COLOURS = { p: "probability", entropy: "entropy", kl: "KL divergence", rank: "rank" };

const LENSES = {
  logit: ["Logit lens", "the final norm and the unembedding are applied to the residual stream"],
  tuned: ["Tuned lens", "a trained affine map, the final norm and the unembedding are applied to the residual stream"],
  jacobian: ["Jacobian lens", "the mean Jacobian, the final norm and the unembedding are applied to the residual stream"],
};

function lensView(lens, kind) {
  const [title, how] = LENSES[kind], { rows } = lens, k = lens.ids.shape[2], cell = (r, t) => r * T + t;
  const mostKl = Math.max(1e-9, ...lens.kl), mostEntropy = Math.max(1e-9, ...lens.entropy), size = DATA.model?.vocab ?? 1e5;
  const shade = { // 0 .. 1; dark: confident, close to the final prediction, or correct
    p: (i) => lens.p[i * k], entropy: (i) => 1 - lens.entropy[i] / mostEntropy,
    kl: (i) => 1 - lens.kl[i] / mostKl, rank: (i) => 1 - Math.min(1, Math.log(lens.rank[i]) / Math.log(size)),
  };
  const meaning = {
    p: "Darker: higher probability of the token shown.", entropy: "Darker: lower entropy.",
    kl: "Darker: lower KL divergence from the final prediction.", rank: "Darker: better rank of the actual next token.",
  };
  const body = view(kind === "logit" ? "lens" : `lens-${kind}`, title,
    `The most likely next token after each component: ${how}. The last row is the model's prediction.`,
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
        fact(t < T - 1 ? "next token" : "most likely", token(piece(lens.target[t]))), fact("its rank", grouped(lens.rank[i])),
        fact("entropy", `${fixed(lens.entropy[i])} nats`), fact("KL from output", `${fixed(lens.kl[i])} nats`)),
      el("h4", {}, "Top predictions"), bars(list));
  }
  function show(before) {
    if (!before || before.lens !== state.lens) {
      cells.forEach((line, r) => line.forEach((node, t) => node.style.setProperty("--w", Math.max(0, shade[state.lens](cell(r, t))).toFixed(3))));
      note.textContent = `${meaning[state.lens]} Underlined: the token shown is the actual next token.`;
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
