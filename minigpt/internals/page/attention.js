// The attention pattern of every head as a small tile; one is enlarged, with the text shaded by one of its rows or columns.

const SCORES = { previous: "previous token", duplicate: "duplicate token", induction: "induction", current: "current token", first: "first token", copying: "copying" };

function attentionView(attn) {
  const { L, H, badges } = attn, N = attn.T, size = (N * (N + 1)) / 2;
  const at = (head, q, k) => (k > q ? 0 : attn.weights[head * size + (q * (q + 1)) / 2 + k]);
  const names = Array.from({ length: L * H }, (_, i) => `L${Math.floor(i / H)}H${i % H}`);
  const strongest = (name) => Object.keys(SCORES).filter((kind) => kind !== "copying").map((kind) => [kind, badges[name]?.[kind] ?? 0]).sort((a, b) => b[1] - a[1])[0];
  const mostEffect = Math.max(1e-9, ...names.map((name) => Math.abs(badges[name]?.effect ?? 0)));
  if (!state.head) {
    const interest = (name) => Math.abs(badges[name]?.effect ?? 0);
    state.head = names.reduce((best, name) => (interest(name) > interest(best) ? name : best));
  }
  const body = view("attention", "Attention",
    "Attention pattern of each head: query tokens are rows, key tokens are columns. Below each head: its highest score on repeated random text, and a bar for the change of the loss on this text when the head is ablated (orange: increase, blue: decrease).",
    () => ({ head: state.head, badges, weights: Array.from({ length: N }, (_, q) => Array.from({ length: q + 1 }, (_, k) => at(names.indexOf(state.head), q, k))) }));

  function paint(canvas, head, name) {
    canvas.width = canvas.height = N;
    const context = canvas.getContext("2d"), image = context.createImageData(N, N), [r, g, b] = rgb(name);
    for (let q = 0; q < N; q++) for (let k = 0; k <= q; k++) image.data.set([r, g, b, 255 * Math.sqrt(at(head, q, k))], 4 * (q * N + k));
    context.putImageData(image, 0, 0);
  }

  const tiles = names.map((name) => {
    const [kind, score] = strongest(name), effect = badges[name]?.effect;
    return el("button", { class: "tile", type: "button", "data-head": name, title: name, onclick: () => set({ head: name }) },
      el("canvas"), effect === undefined ? null : el("i", { class: effect < 0 ? "effect less" : "effect", "--w": Math.abs(effect) / mostEffect }),
      el("span", { class: "name" }, name, score >= 0.3 ? el("em", {}, `${SCORES[kind]} ${fixed(score)}`) : null));
  });
  const grid = el("div", { class: H > 8 ? "tiles many" : "tiles", "--h": H }, ...tiles);
  const big = el("canvas", { class: "big", tabindex: 0, "aria-label": "attention of one head" });
  const row = el("div", { class: "row" }), column = el("div", { class: "column" });
  const caption = el("h3"), facts = el("dl", { class: "facts" }), said = el("p", { class: "note" });
  const strip = el("div", { class: "flow strip" }), spans = DATA.tokens.map(({ s }, t) => el("span", {
    class: "t", onpointerenter: () => hover(t), onclick: () => lock(t),
  }, visible(s)));
  DATA.tokens.forEach(({ s }, t) => { strip.append(spans[t]); if (s.includes("\n")) strip.append(el("br")); });
  const turn = chooser("turn", { from: "attends to", to: "is attended by" }, "Token");
  body.append(el("div", { class: "split even" }, grid,
    el("div", { class: "large" }, caption, facts, el("div", { class: "square" }, big, row, column), turn, said, strip)));
  const place = (event) => {
    const box = big.getBoundingClientRect(), cell = (v, from, width) => Math.min(N - 1, Math.max(0, Math.floor(((v - from) / width) * N)));
    return { q: cell(event.clientY, box.top, box.height), k: cell(event.clientX, box.left, box.width) };
  };
  big.addEventListener("pointermove", (event) => hover(place(event).q));
  big.addEventListener("click", (event) => lock(place(event).q));

  function show(before) {
    const head = names.indexOf(state.head), badge = badges[state.head] ?? {}, t = state.tok;
    if (!before || before.head !== state.head || before.theme !== state.theme) {
      paint(big, head, "--accent");
      tiles.forEach((tile) => tile.setAttribute("aria-pressed", tile.dataset.head === state.head));
      fill(caption, state.head, el("small", {}, `layer ${Math.floor(head / H)}, head ${head % H}`));
      fill(facts, ...Object.entries(SCORES).filter(([kind]) => kind in badge).map(([kind, label]) => fact(label, fixed(badge[kind]))),
        "effect" in badge ? fact("loss increase when ablated", `${signed(badge.effect, 3)} nats`) : null);
    }
    const weight = (j) => (state.turn === "from" ? at(head, t, j) : at(head, j, t));
    let most = 0;
    spans.forEach((span, j) => {
      const w = weight(j);
      if (w > weight(most)) most = j;
      span.style.setProperty("--w", Math.sqrt(w));
      span.classList.toggle("on", j === t);
    });
    row.hidden = state.turn !== "from";
    column.hidden = state.turn === "from";
    row.style.setProperty("top", `${(100 * t) / N}%`);
    row.style.setProperty("height", `${100 / N}%`);
    column.style.setProperty("left", `${(100 * t) / N}%`);
    column.style.setProperty("width", `${100 / N}%`);
    fill(said, token(tokenAt(t)), ` (${t}) ${state.turn === "from" ? "attends most to" : "is attended most by"} `, token(tokenAt(most)), ` (${most}), ${percent(weight(most))}`);
  }
  const paintAll = () => tiles.forEach((tile, head) => paint(tile.querySelector("canvas"), head, "--accent"));
  watchers.push((before) => { if (before.theme !== state.theme) paintAll(); show(before); });
  paintAll();
  show();
}
