// The sampling processors (minigpt/sampling) reimplemented in JavaScript, so that the page can react to its sliders.
//
// A distribution is a list of logits z and counts n: the number of tokens that each entry represents. n is 1, except for
// groups of unlikely tokens of a large vocabulary. Tokens are sorted by id, because ties are broken by the lowest id.
// A step is (z, n, params, context) -> z; removed tokens get -Infinity. All in double precision, as in Python.

const NEVER = -Infinity;

function softmax(z, n) { // -> p: probability of one token of each entry; mass: of all its tokens
  const top = Math.max(...z);
  const p = z.map((v) => Math.exp(v - top));
  const total = p.reduce((sum, v, i) => sum + v * n[i], 0);
  return { p: p.map((v) => v / total), mass: p.map((v, i) => (v * n[i]) / total) };
}

function entropyOf(z, n) {
  const { p, mass } = softmax(z, n);
  return p.reduce((sum, v, i) => (v > 0 ? sum - mass[i] * Math.log(v) : sum), 0);
}

const cut = (z, values, border) => z.map((v, i) => (values[i] < border ? NEVER : v));
const ranking = (keys) => keys.map((_, i) => i).sort((a, b) => (keys[a] === keys[b] ? a - b : keys[b] > keys[a] ? 1 : -1));

// Keep entries in descending order of a key, up to the first one for which `goes` is true (exclusive).
function keepFirst(z, keys, goes) {
  const result = z.map(() => NEVER);
  for (const i of ranking(keys)) {
    if (z[i] === NEVER || goes(i)) break;
    result[i] = z[i];
  }
  return result;
}

function withSeen(z, context, change) { // applies change(logit, count) to the tokens that occur in the text
  return z.map((v, i) => (context.counts[i] ? change(v, context.counts[i]) : v));
}

const STEPS = {
  repetition_penalty: (z, n, { repetition_penalty: r }, context) => withSeen(z, context, (v) => (v < 0 ? v * r : v / r)),
  presence_penalty: (z, n, params, context) => withSeen(z, context, (v) => v - params.presence_penalty),
  frequency_penalty: (z, n, params, context) => withSeen(z, context, (v, count) => v - params.frequency_penalty * count),
  smoothing_factor: (z, n, { smoothing_factor: f, smoothing_curve: curve }) => {
    const top = Math.max(...z);
    return z.map((v) => (v === NEVER ? v : top + f * (v - top) ** 2 * (((curve - 1) / 2) * (v - top) - (3 - curve) / 2)));
  },
  temperature: (z, n, { temperature: t, dynatemp_range: spread, dynatemp_exponent: exponent }) => {
    const possible = z.reduce((sum, v, i) => sum + (v > NEVER ? n[i] : 0), 0);
    if (spread && possible > 1) {
      const flatness = Math.min(1, Math.max(0, entropyOf(z, n) / Math.log(possible)));
      const lowest = Math.max(0, t - spread);
      t = Math.max(1e-6, lowest + (t + spread - lowest) * flatness ** exponent);
    } else if (spread) t = 1;
    return z.map((v) => v / t);
  },
  top_k: (z, n, { top_k: k }) => {
    let count = 0;
    const border = ranking(z).find((i) => (count += n[i]) >= k);
    return border === undefined ? z.slice() : cut(z, z, z[border]);
  },
  top_p: (z, n, { top_p }) => {
    const { mass } = softmax(z, n);
    let before = 0;
    return keepFirst(z, z, (i) => before >= Math.max(top_p, 1e-300) || ((before += mass[i]), false));
  },
  min_p: (z, n, { min_p }) => cut(z, z, Math.max(...z) + Math.log(min_p)),
  top_a: (z, n, { top_a }) => {
    const { p } = softmax(z, n);
    return cut(z, p, top_a * Math.max(...p) ** 2);
  },
  epsilon_cutoff: (z, n, { epsilon_cutoff: e }) => {
    const { p } = softmax(z, n);
    return cut(z, p, Math.min(e, Math.max(...p)));
  },
  eta_cutoff: (z, n, { eta_cutoff: e }) => {
    const { p } = softmax(z, n);
    return cut(z, p, Math.min(e, Math.sqrt(e) * Math.exp(-entropyOf(z, n)), Math.max(...p)));
  },
  typical_p: (z, n, { typical_p }) => {
    const { p, mass } = softmax(z, n), entropy = entropyOf(z, n);
    const closeness = p.map((v) => (v > 0 ? -Math.abs(-Math.log(v) - entropy) : NEVER));
    let sum = 0, last = NEVER;
    for (const i of ranking(closeness)) {
      if (closeness[i] === NEVER) break;
      last = closeness[i];
      if ((sum += mass[i]) >= typical_p) break;
    }
    return cut(z, closeness, last);
  },
  tail_free: (z, n, { tail_free }) => {
    const order = ranking(z), top = z[order[0]];
    const p = order.map((i) => Math.exp(z[i] - top));
    const bends = p.slice(2).map((v, i) => Math.abs(v - 2 * p[i + 1] + p[i]));
    const all = bends.reduce((sum, v) => sum + v, 0);
    const result = z.map(() => NEVER);
    let spent = 0;
    order.forEach((i, place) => { // the first bend applies to the first two tokens, the last one to the last two
      if (place >= 1 && place <= bends.length) spent += bends[place - 1];
      if (place === 0 || !(Math.max(spent, bends[0] ?? 0) > tail_free * all)) result[i] = z[i];
    });
    return result;
  },
  top_n_sigma: (z, n, { top_n_sigma }) => {
    const there = z.map((v, i) => i).filter((i) => z[i] > NEVER);
    const count = there.reduce((sum, i) => sum + n[i], 0);
    const mean = there.reduce((sum, i) => sum + n[i] * z[i], 0) / count;
    const variance = there.reduce((sum, i) => sum + n[i] * (z[i] - mean) ** 2, 0) / count;
    return cut(z, z, Math.max(...z) - top_n_sigma * Math.sqrt(variance));
  },
  top_h: (z, n, { top_h }) => {
    const order = ranking(z).filter((i) => z[i] > NEVER).slice(0, 100);
    const { p } = softmax(order.map((i) => z[i]), order.map((i) => n[i]));
    const parts = p.map((v, place) => (v > 0 ? -n[order[place]] * v * Math.log(v) : 0));
    const whole = parts.reduce((sum, v) => sum + v, 0);
    const result = z.map(() => NEVER);
    let sum = 0;
    order.forEach((i, place) => {
      sum += parts[place];
      if (place === 0 || (sum <= top_h * whole && parts[place] > 0)) result[i] = z[i];
    });
    return result;
  },
  p_less: (z, n) => {
    const { p, mass } = softmax(z, n);
    return cut(z, p, Math.min(p.reduce((sum, v, i) => sum + v * mass[i], 0), Math.max(...p)));
  },
};
const PENALTIES = ["repetition_penalty", "presence_penalty", "frequency_penalty"]; // the only processors that affect greedy decoding

function isOn(name, params, off) {
  if (name === "temperature") return params.temperature !== 1 || params.dynatemp_range > 0;
  return params[name] !== off[name];
}

// The model's distribution and the distribution after each active step:
// [{name, z, p, mass, possible, removed, lost, entropy, kl}]; entropy and kl (to the model's) in nats, lost: removed mass.
function stagesOf(start, params, order, off, context) {
  const { z: model, n } = start, greedy = params.temperature === 0;
  const made = [{ name: "model", z: model }];
  for (const name of order) {
    if (!(name in STEPS) || !isOn(name, params, off) || (greedy && !PENALTIES.includes(name))) continue;
    made.push({ name, z: STEPS[name](made[made.length - 1].z, n, params, context) });
  }
  if (greedy) {
    const { z } = made[made.length - 1], first = ranking(z)[0];
    made.push({ name: "likeliest", z: z.map((v, i) => (i === first ? v : NEVER)) });
  }
  const first = softmax(model, n);
  return made.map(({ name, z }, place) => {
    const { p, mass } = softmax(z, n), before = place ? softmax(made[place - 1].z, n).mass : mass;
    const gone = z.map((v, i) => v === NEVER && place > 0 && made[place - 1].z[i] > NEVER);
    return {
      name, z, p, mass,
      possible: z.reduce((sum, v, i) => sum + (v > NEVER ? n[i] : 0), 0),
      removed: gone.reduce((sum, g, i) => sum + (g ? n[i] : 0), 0),
      lost: gone.reduce((sum, g, i) => sum + (g ? before[i] : 0), 0),
      entropy: entropyOf(z, n),
      kl: p.reduce((sum, v, i) => (v > 0 ? sum + mass[i] * Math.log(v / first.p[i]) : sum), 0),
    };
  });
}
