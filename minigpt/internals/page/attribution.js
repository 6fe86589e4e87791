// Direct logit attribution: the contribution of each component to the next token's logit.

function attributionView(dla) {
  const R = dla.rows.length, LISTED = 14;
  const body = view("attribution", "Logit attribution",
    "The logit of the next token is a sum of terms, one for each component that writes to the residual stream. Shown are the terms at the selected token.",
    () => dla, chooser("dla", { logit: "logit", rival: "logit difference to the rival" }, "Explain"), chooser("bars", { largest: "largest", order: "in order" }, "Show"));
  const list = el("ol", { class: "terms" }), said = el("p", { class: "note" }), sum = el("p", { class: "sum" });
  body.append(said, list, sum);

  function show() {
    const t = state.tok, value = (which, r) => dla.values[(which * T + t) * R + r];
    const against = state.dla === "rival";
    const take = (f) => f(0) - (against ? f(1) : 0);
    let terms = dla.rows.map((name, r) => [name, take((which) => value(which, r))]);
    const logit = take((which) => dla.logit[which * T + t]), residual = take((which) => dla.residual[which * T + t]);
    if (state.bars === "largest") {
      const ranked = terms.slice().sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
      const rest = ranked.slice(LISTED);
      terms = ranked.slice(0, LISTED);
      if (rest.length) terms.push([`${rest.length} others`, rest.reduce((total, [, v]) => total + v, 0)]);
    }
    const low = Math.min(0, ...terms.map(([, v]) => v)), range = Math.max(1e-9, ...terms.map(([, v]) => v - low), -low);
    list.style.setProperty("--zero", -low / range);
    const rivalText = token(piece(dla.versus[t])), answer = token(piece(dla.answer[t]));
    fill(said, "After ", token(tokenAt(t)), ` (${t}): `, answer, t < T - 1 ? ", the next token" : ", the most likely next token",
      against ? ", minus its strongest rival " : "", against ? rivalText : "", ".");
    fill(list, ...terms.map(([name, v]) => el("li", { class: v < 0 ? "minus" : "" },
      el("span", {}, name), el("span", { class: "axis" }, el("i", { "--w": Math.abs(v) / range })), el("b", {}, signed(v)))));
    const capped = dla.capped ? ` After the soft cap of ${dla.cap} ${against ? "the difference" : "it"} is ${fixed(take((which) => dla.capped[which * T + t]), 3)}.` : "";
    fill(sum, el("b", {}, `${fixed(logit, 3)}`), ` is the sum of all ${R} terms; the numerical remainder is ${short(residual)}. The final norm divides by ${fixed(dla.scale[t], 3)}.${capped}`);
  }
  watchers.push(show);
  show();
}
