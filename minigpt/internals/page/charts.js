// Training curves, and heat maps of the additional results on the page.

const COLOURED = 6, WIDE = 360, HIGH = 170, LEFT = 44, BOTTOM = 22, ABOVE = 8, RIGHT = 8;

function ticksOf(low, high, count = 4) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const made = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) made.push(+v.toPrecision(12));
  return made;
}

// One chart with lines [{name, steps, values}]; hovering shows the nearest point.
function chart(title, lines) {
  const steps = lines.flatMap((line) => line.steps), values = lines.flatMap((line) => line.values);
  const [x0, x1] = [Math.min(...steps), Math.max(...steps)];
  let [y0, y1] = [Math.min(...values), Math.max(...values)];
  const room = (y1 - y0 || Math.abs(y1) || 1) * 0.05;
  [y0, y1] = [y0 >= 0 && y0 < (y1 - y0) ? 0 : y0 - room, y1 + room];
  const along = lines[0].steps, logarithmic = along.length > 4 && along[along.length - 1] - along[along.length - 2] > 8 * (along[1] - along[0]);
  const scaled = (step) => (logarithmic ? Math.log1p(step) : step), width = scaled(x1) - scaled(x0) || 1;
  const px = (step) => LEFT + ((scaled(step) - scaled(x0)) / width) * (WIDE - LEFT - RIGHT);
  const py = (value) => ABOVE + (1 - (value - y0) / (y1 - y0)) * (HIGH - BOTTOM - ABOVE);
  const draw = (name, props, ...children) => el(`svg:${name}`, props, ...children);
  const moved = lines.map(({ values: v }) => Math.max(...v) - Math.min(...v)), most = ranking(moved).slice(0, COLOURED);
  const hue = (i) => (lines.length < 3 ? (i ? "var(--warm)" : "var(--accent)")
    : most.includes(i) ? `oklch(var(--line-l) 0.13 ${(260 + (360 * most.indexOf(i)) / COLOURED) % 360})` : "var(--other)");
  const paths = lines.map((line, i) => draw("path", {
    class: "line", "--c": hue(i), d: line.steps.map((step, j) => `${j ? "L" : "M"}${px(step).toFixed(1)} ${py(line.values[j]).toFixed(1)}`).join(""),
  }));
  const dot = draw("circle", { r: 3, class: "dot", visibility: "hidden" }), said = el("output");
  const picture = draw("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", "aria-label": title },
    ...ticksOf(y0, y1).flatMap((v) => [draw("line", { class: "rule", x1: LEFT, x2: WIDE - RIGHT, y1: py(v), y2: py(v) }), draw("text", { x: LEFT - 6, y: py(v) + 3.5, "text-anchor": "end" }, short(v))]),
    draw("text", { x: LEFT, y: HIGH - 6 }, `step ${grouped(x0)}${logarithmic ? ", logarithmic" : ""}`), draw("text", { x: WIDE - RIGHT, y: HIGH - 6, "text-anchor": "end" }, grouped(x1)), ...paths, dot);
  const rest = () => {
    const best = lines.length < 3 ? lines : [lines[most[0]]];
    fill(said, ...best.flatMap((line) => [el("i", { "--c": hue(lines.indexOf(line)) }), `${line.name} ${short(line.values[line.values.length - 1])} `]));
    paths.forEach((path) => path.classList.remove("faint"));
    dot.setAttribute("visibility", "hidden");
  };
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect(), x = ((event.clientX - box.left) / box.width) * WIDE, y = ((event.clientY - box.top) / box.height) * HIGH;
    let found = null;
    lines.forEach((line, i) => line.steps.forEach((step, j) => {
      const away = Math.hypot(px(step) - x, py(line.values[j]) - y);
      if (!found || away < found.away) found = { away, i, j };
    }));
    const { i, j } = found, line = lines[i];
    dot.setAttribute("cx", px(line.steps[j]));
    dot.setAttribute("cy", py(line.values[j]));
    dot.setAttribute("visibility", "visible");
    paths.forEach((path, at) => path.classList.toggle("faint", at !== i));
    fill(said, el("i", { "--c": hue(i) }), `${line.name} ${short(line.values[j])} at step ${grouped(line.steps[j])}`);
  });
  picture.addEventListener("pointerleave", rest);
  rest();
  return el("figure", {}, el("figcaption", {}, title, said), picture);
}

const CHARTS = { "train/loss": "Loss, nats per token", "val/loss": "Loss, nats per token", lr: "Learning rate", grad_norm: "Gradient norm" };

function trainingView({ series, kinds }) {
  const charts = { [CHARTS["train/loss"]]: [] }; // loss first, learning rate and gradient norm last
  for (const [name, [steps, values]] of Object.entries(series)) {
    const [, kind, what] = name.match(/^internals\/([^/]+)\/?(.*)$/) ?? [];
    const [named, unit] = kinds?.[kind] ?? [(kind ?? "").replace(/_/g, " "), ""];
    const title = kind ? `${named}${unit ? `, ${unit}` : ""}` : CHARTS[name] ?? name;
    (charts[title] ??= []).push({ name: kind ? what || kind : { "train/loss": "training", "val/loss": "validation" }[name] ?? "last", steps, values });
  }
  const body = view("training", "Training", "Curves of the training run from metrics.jsonl: loss, learning rate, gradient norm, and snapshots of the internals if they were logged.", () => series);
  const late = [CHARTS.lr, CHARTS.grad_norm], order = (title) => late.indexOf(title);
  const shown = Object.entries(charts).filter(([, lines]) => lines.length).sort(([a], [b]) => order(a) - order(b));
  body.append(el("div", { class: "charts" }, ...shown.map(([title, lines]) => chart(title, lines))));
}

function gridView(grid, number) {
  const most = Math.max(1e-12, ...grid.values.flat().map((v) => Math.abs(v ?? 0))), small = grid.x.length <= 16;
  const said = el("p", { class: "note" }, `Rows: ${grid.yname}; columns: ${grid.xname}${grid.unit ? `; ${grid.unit}` : ""}. Largest magnitude: ${short(most)}.`);
  const body = view(`grid${number}`, grid.name, "Blue is positive, red is negative; darker means larger magnitude.", () => grid);
  body.append(el("div", { class: "scroll" }, el("table", { class: small ? "heat" : "heat dense" },
    el("thead", {}, el("tr", {}, el("th"), ...grid.x.map((name) => el("th", { scope: "col" }, visible(name))))),
    el("tbody", {}, ...grid.y.map((name, r) => el("tr", {}, el("th", { scope: "row" }, visible(name)), ...grid.values[r].map((v, c) => el("td", {
      "--w": Math.abs(v ?? 0) / most, class: v < 0 ? "minus" : "", onpointerenter: () => fill(said, `${visible(name)}, ${visible(grid.x[c])}: ${v === null ? "none" : short(v)}`),
    }, small && v !== null ? short(+v.toPrecision(2)) : ""))))))), said);
}
