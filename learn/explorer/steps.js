// Every kind of step, forward and backward: its formula, its tensors, and where each of their numbers comes from.
// pass(formula, "what goes in -> what it gives", explain): explain(s, role, index) says in lines how the number at
// index of the tensor `role` is made, from numbers s.ref(role, ...index) of the same step. There are two kinds of lines:
//     sum(name, terms, times)    a sum of products of such numbers, times a factor
//     line(name, text, value)    anything else, written out
// The last line's value is the number itself: tests compare all of them with numpygpt's.
// A kind that is a part of a function has names of its own, and says what it does: [forward, backward]. The others have
// the function's name and docstring.
"use strict";

const range = (n) => [...Array(n).keys()];
const product = (refs) => refs.reduce((value, ref) => value * ref.value, 1);
const total = (values) => values.reduce((a, b) => a + b, 0);
const sum = (name, terms, times = 1) => ({ name, terms, times, value: times * total(terms.map(product)) });
const line = (name, text, value, refs = []) => ({ name, text, value, refs });
const added = (name, parts) =>
  line(name, parts.map((part) => inner(part.value)).join(" + "), total(parts.map((part) => part.value)));
const geluInner = (x) => Math.sqrt(2 / Math.PI) * (x + 0.044715 * x * x * x);

function pass(formula, flow, explain) {
  const [show, give] = flow.split("->").map((roles) => roles.split(" ").filter(Boolean));
  return { formula, show, give, explain };
}

function softmaxLines(row, i) {
  const max = Math.max(...row.map((ref) => ref.value));
  const exp = row.map((ref) => Math.exp(ref.value - max));
  return [
    line("exp", `exp(${num(row[i].value)} − ${inner(max)}), the row's maximum subtracted`, exp[i], row),
    line("the row's sum", exp.map((value) => num(value)).join(" + "), total(exp)),
    line("share", `${num(exp[i])} / ${num(total(exp))}`, exp[i] / total(exp)),
  ];
}

const KINDS = {
  embedding: {
    forward: pass("x[t] = wte[idx[t]] + wpe[t]", "wte wpe -> x", (s, role, [t, c]) =>
      [sum("token + position", [[s.ref("wte", DATA.idx[t], c)], [s.ref("wpe", t, c)]])]),
    backward: pass(
      "dwte[v] = Σ dx[t] over idx[t] = v, + dwte_head[v]      dwpe[t] = dx[t]", "dx head -> dwte dwpe",
      (s, role, [i, c]) => {
        if (role === "dwpe") return [sum("the position is used once", i < s.T ? [[s.ref("dx", i, c)]] : [])];
        const places = range(s.T).filter((t) => DATA.idx[t] === i);
        const read = sum("where the token is read", places.map((t) => [s.ref("dx", t, c)]));
        const head = sum("as the head", [[s.ref("head", i, c)]]);
        return [read, head, added("wte is used in two places", [read, head])];
      }),
  },

  fork: {
    names: ["x is used twice", "dx + dbranch"],
    what: [
      "The block's input goes two ways: through the branch, and around it, unchanged.",
      "x was used in two places, so its gradient is the sum of what comes back from both.",
    ],
    forward: pass("branch = f(x), and x goes on", "-> x", (s, role, i) => [sum("as it is", [[s.ref("x", ...i)]])]),
    backward: pass("dx = dx + dbranch", "dsum dbranch -> dx", (s, role, i) =>
      [sum("around the branch + through it", [[s.ref("dsum", ...i)], [s.ref("dbranch", ...i)]])]),
  },

  layernorm: {
    forward: pass(
      "xhat = (x − mean) · rstd, rstd = 1/√(variance + 10⁻⁵)      out = xhat · weight + bias", "x weight bias -> out",
      (s, role, [t, c]) => {
        const row = range(s.C).map((i) => s.ref("x", t, i)), weight = s.ref("weight", c);
        const mean = sum("mean", row.map((x) => [x]), 1 / s.C);
        const variance = total(row.map((x) => (x.value - mean.value) ** 2)) / s.C;
        const rstd = 1 / Math.sqrt(variance + 1e-5), xhat = (row[c].value - mean.value) * rstd;
        const bias = s.has("bias") ? s.ref("bias", c) : { value: 0 };
        const out = `${num(xhat)} · ${inner(weight.value)} + ${inner(bias.value)}`;
        return [
          mean,
          line("variance", "the mean of (x − mean)² along the row", variance),
          line("rstd", `1 / √(${num(variance)} + 10⁻⁵)`, rstd),
          line("xhat", `(${num(row[c].value)} − ${inner(mean.value)}) · ${num(rstd)}`, xhat),
          line("out", out, xhat * weight.value + bias.value, [weight, bias]),
        ];
      }),
    backward: pass(
      "dx = rstd · (dxhat − mean(dxhat) − xhat · mean(dxhat · xhat)), dxhat = dout · weight",
      "dout weight xhat rstd -> dx dweight dbias",
      (s, role, [t, c]) => {
        if (role === "dweight") return [s.overTokens((u) => [s.ref("dout", u, t), s.ref("xhat", u, t)])];
        if (role === "dbias") return [s.overTokens((u) => [s.ref("dout", u, t)])];
        const dxhat = range(s.C).map((i) => [s.ref("dout", t, i), s.ref("weight", i)]);
        const mean = sum("mean(dxhat)", dxhat, 1 / s.C);
        const along = sum("mean(dxhat · xhat)", dxhat.map((term, i) => [...term, s.ref("xhat", t, i)]), 1 / s.C);
        const [rstd, xhat] = [s.ref("rstd", t, 0), s.ref("xhat", t, c)], own = product(dxhat[c]), r = rstd.value;
        const terms = [
          line("1. directly: rstd · dxhat", `${num(r)} · ${inner(own)}`, r * own, [rstd]),
          line("2. through the mean: −rstd · mean(dxhat)", `−${num(r)} · ${inner(mean.value)}`, -r * mean.value),
          line("3. through the variance: −rstd · xhat · mean(dxhat · xhat)",
            `−${num(r)} · ${inner(xhat.value)} · ${inner(along.value)}`, -r * xhat.value * along.value),
        ];
        return [mean, along, ...terms, added("1 + 2 + 3", terms)];
      }),
  },

  linear: {
    forward: pass("out = x @ weight.T + bias", "x weight bias -> out", (s, role, [t, o]) => {
      const terms = range(s.width("x")).map((i) => [s.ref("x", t, i), s.ref("weight", o, i)]);
      return [sum("row · row", s.has("bias") ? [...terms, [s.ref("bias", o)]] : terms)];
    }),
    backward: pass(
      "dx = dout @ weight      dweight = dout.T @ x      dbias = Σ dout over tokens",
      "dout weight x -> dx dweight dbias",
      (s, role, [a, b]) => {
        if (role === "dweight") return [s.overTokens((t) => [s.ref("dout", t, a), s.ref("x", t, b)])];
        if (role === "dbias") return [s.overTokens((t) => [s.ref("dout", t, a)])];
        const terms = range(s.width("dout")).map((o) => [s.ref("dout", a, o), s.ref("weight", o, b)]);
        if (!s.part.endsWith("c_attn")) return [sum("over all outputs that x fed", terms)];
        const paths = ["q", "k", "v"].map((name, i) => sum(`through ${name}`, terms.slice(i * s.C, (i + 1) * s.C)));
        return [...paths, added("x was used for all three", paths)];
      }),
  },

  split: {
    names: ["cut into heads", "join heads"],
    what: [
      "A token's row of qkv holds q, k and v, one after the other, each of them head by head. The row is cut and its parts are sorted: nothing is computed.",
      "Nothing was computed, so every gradient goes back to the place that its number came from.",
    ],
    forward: pass("q, k, v = qkv.reshape(T, 3, nh, hs).transpose(1, 2, 0, 3)", "qkv -> q k v", (s, role, [h, t, j]) =>
      [sum("a copy", [[s.ref("qkv", t, "qkv".indexOf(role) * s.C + h * s.hs + j)]])]),
    backward: pass("dqkv = (dq, dk, dv).transpose(2, 0, 1, 3).reshape(T, 3C)", "dq dk dv -> dqkv", (s, role, [t, o]) =>
      [sum("a copy", [[s.ref("d" + "qkv"[Math.floor(o / s.C)], Math.floor((o % s.C) / s.hs), t, o % s.hs)]])]),
  },

  scores: {
    names: ["q @ k.T, mask", "dq, dk"],
    what: [
      "Each token's query is compared with the key of every token up to itself. The product of the two vectors is large where they point the same way; divided by √hs, it stays near 1 whatever the size of a head. A token must not see later ones, so their scores are −∞.",
      "A score is a product of a query and a key, so each one's gradient is the score's gradient times the other. A query collects it from all keys that it was compared with, a key from all queries. Masked scores were the same whatever q and k were: their gradient is 0.",
    ],
    forward: pass("att = q @ k.T / √hs, and −∞ for the future", "q k -> att", (s, role, [h, t, u]) => {
      const terms = range(s.hs).map((j) => [s.ref("q", h, t, j), s.ref("k", h, u, j)]);
      const score = sum("query · key / √hs", terms, 1 / Math.sqrt(s.hs));
      return u <= t ? [score] : [score, line("masked", "the key is in the query's future", -Infinity)];
    }),
    backward: pass("dq = datt @ k / √hs      dk = datt.T @ q / √hs", "datt q k -> dq dk", (s, role, [h, t, j]) => {
      const other = (u) => (role === "dq" ? [["datt", h, t, u], ["k", h, u, j]] : [["datt", h, u, t], ["q", h, u, j]]);
      return [s.overTokens((u) => other(u).map((ref) => s.ref(...ref)), 1 / Math.sqrt(s.hs))];
    }),
  },

  softmax: {
    forward: pass("probs = exp(att) / Σ exp(att) along the row", "att -> probs", (s, role, [h, t, u]) =>
      softmaxLines(range(s.T).map((i) => s.ref("att", h, t, i)), u)),
    backward: pass(
      "datt = probs · (dprobs − Σ dprobs · probs along the row)", "dprobs probs -> datt", (s, role, [h, t, u]) => {
        const row = sum("Σ", range(s.T).map((i) => [s.ref("dprobs", h, t, i), s.ref("probs", h, t, i)]));
        const [p, d] = [s.ref("probs", h, t, u).value, s.ref("dprobs", h, t, u).value];
        return [row, line("datt", `${num(p)} · (${num(d)} − ${inner(row.value)})`, p * (d - row.value))];
      }),
  },

  average: {
    names: ["probs @ v", "dprobs, dv"],
    what: [
      "Each token takes an average of the values. Its row of probs says how much of each.",
      "The average is a product of probs and v, so each one's gradient is dy times the other. Where dprobs[t, u] is negative, the loss would fall if token t looked more at token u. A value collects its gradient from all tokens that looked at it, each by as much as it looked.",
    ],
    forward: pass("y = probs @ v, the heads side by side", "probs v -> y", (s, role, [t, c]) => {
      const h = Math.floor(c / s.hs);
      return [s.overTokens((u) => [s.ref("probs", h, t, u), s.ref("v", h, u, c % s.hs)])];
    }),
    backward: pass("dprobs = dy @ v.T      dv = probs.T @ dy", "dy v probs -> dprobs dv", (s, role, [h, t, u]) => {
      if (role === "dv") return [s.overTokens((i) => [s.ref("probs", h, i, t), s.ref("dy", i, h * s.hs + u)])];
      return [sum("row · row", range(s.hs).map((j) => [s.ref("dy", t, h * s.hs + j), s.ref("v", h, u, j)]))];
    }),
  },

  gelu: {
    forward: pass("out = x/2 · (1 + tanh(u)), u = √(2/π) · (x + 0.044715 x³)", "x -> out", (s, role, index) => {
      const x = s.ref("x", ...index), tanh = Math.tanh(geluInner(x.value));
      const out = line("out", `${num(x.value)}/2 · (1 + ${inner(tanh)})`, 0.5 * x.value * (1 + tanh), [x]);
      return [line("tanh(u)", `u = ${num(geluInner(x.value))}`, tanh), out];
    }),
    backward: pass("dx = dout · (½(1 + tanh) + x/2 · (1 − tanh²) · du/dx)", "dout x -> dx", (s, role, index) => {
      const x = s.ref("x", ...index), dout = s.ref("dout", ...index), tanh = Math.tanh(geluInner(x.value));
      const du = Math.sqrt(2 / Math.PI) * (1 + 3 * 0.044715 * x.value ** 2);
      const slope = line("the slope of GELU", `at ${num(x.value)}`, 0.5 * (1 + tanh + x.value * (1 - tanh * tanh) * du), [x]);
      return [slope, line("dx", `${num(dout.value)} · ${inner(slope.value)}`, dout.value * slope.value, [dout])];
    }),
  },

  add: {
    names: ["x + branch", "dx, copied"],
    what: [
      "The branch adds to x and overwrites nothing, so later layers still have what came before it.",
      "A sum hands its gradient on to both terms, unchanged: to the branch, and to x around it.",
    ],
    forward: pass("x = x + branch", "x branch -> sum", (s, role, i) =>
      [sum("stream + branch", [[s.ref("x", ...i)], [s.ref("branch", ...i)]])]),
    backward: pass("dbranch = dx, and dx goes on", "dsum -> dbranch", (s, role, i) => [sum("a copy", [[s.ref("dsum", ...i)]])]),
  },

  loss: {
    forward: pass("probs = softmax(logits)      loss = mean of −log probs[target]", "logits -> probs loss", (s, role, [t, v]) => {
      if (role === "probs") return softmaxLines(range(s.width("logits")).map((i) => s.ref("logits", t, i)), v);
      const surprise = DATA.targets.map((id, u) => {
        const p = s.ref("probs", u, id);
        return line(`−log p(${DATA.tokens[id]})`, `−log ${num(p.value)}`, -Math.log(p.value), [p]);
      });
      return [...surprise, line("loss", "their mean", total(surprise.map((part) => part.value)) / s.T)];
    }),
    backward: pass("dlogits = (probs − 1 at the target) / T", "probs -> dlogits", (s, role, [t, v]) => {
      const p = s.ref("probs", t, v), hit = Number(v === DATA.targets[t]);
      return [line("dlogits", `(${num(p.value)} − ${hit}) / ${s.T}`, (p.value - hit) / s.T, [p])];
    }),
  },
};
