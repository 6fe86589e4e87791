// The text with the loss of each token and the top predictions for it.

function tokensView(loss) {
  const nats = loss ? Array.from(loss.nats) : [];
  const total = nats.reduce((sum, v) => sum + v, 0), mean = total / Math.max(1, nats.length);
  const scale = Math.max(4, ...nats);
  const sentence = loss
    ? `Each token is shaded by its loss (surprisal); the mean is ${fixed(mean)} nats (${fixed(mean / Math.LN2)} bits) per token.`
    : "One token only, so there are no predictions.";
  const body = view("text", "Text", sentence, () => ({ tokens: DATA.tokens, loss }));
  const flow = el("div", { class: "flow", role: "listbox", "aria-label": "tokens" });
  const spans = DATA.tokens.map(({ s }, t) => el("span", {
    class: t ? "t" : "t none", "--w": t && loss ? Math.min(1, nats[t - 1] / scale) : 0, role: "option",
    onpointerenter: () => hover(t), onclick: () => lock(t),
  }, s === "" || /[\u0000-\u0009\u000b-\u001f]/.test(s) ? visible(s) : s.replace(/\n/g, "↵")));
  DATA.tokens.forEach(({ s }, t) => { flow.append(spans[t]); if (s.includes("\n")) flow.append(el("br")); });
  const panel = el("aside", { class: "panel" });
  const legend = el("div", { class: "legend" }, el("span", {}, "0"), el("i", { class: "ramp" }), el("span", {}, `${fixed(scale, 1)} nats`));
  const strip = DATA.tokens.map((_, t) => el("i", { "--w": t && loss ? nats[t - 1] / scale : 0, onpointerenter: () => hover(t), onclick: () => lock(t) }));
  body.append(el("div", { class: "split" }, el("div", {}, flow, ...(loss ? [legend, el("div", { class: "profile" }, ...strip)] : [])), panel));

  function show() {
    for (const line of [spans, strip]) line.forEach((node, t) => node.classList.toggle("on", t === state.tok));
    const t = state.tok, head = el("h3", {}, token(tokenAt(t)), el("small", {}, `token ${t}, id ${DATA.tokens[t].id}`));
    if (!t || !loss) return fill(panel, head, el("p", { class: "note" }, "The first token is not predicted."));
    const i = t - 1, k = loss.ids.shape[1], at = i * k, id = DATA.tokens[t].id;
    const rows = Array.from({ length: k }, (_, j) => [piece(loss.ids[at + j]), loss.p[at + j], loss.ids[at + j] === id]);
    let before = 0;
    for (let j = 0; j <= i; j++) before += nats[j];
    fill(panel, head, el("dl", { class: "facts" },
      fact("loss", `${fixed(nats[i])} nats`), fact("probability", percent(Math.exp(-nats[i]))), fact("rank", grouped(loss.rank[i])),
      fact("entropy", `${fixed(loss.entropy[i])} nats`), fact("mean so far", `${fixed(before / t)} nats`)),
      el("h4", {}, "Top predictions"), bars(rows));
  }
  watchers.push(show);
  show();
}
