// Every kind of step, forward and backward: what it does, its formula, its tensors, and where each of their numbers
// comes from. `show` goes in, `give` comes out; explain(s, role, index) says how the number at index of what comes out
// is made, in lines of two kinds:
//     sum(name, terms, times)    a sum of products of numbers on the page, times a factor
//     line(name, text, value)    anything else, written out
// The last line's value is the number itself; the tests compare all of them with numpygpt's.
"use strict";

const range = (n) => [...Array(n).keys()];
const total = (terms) => terms.reduce((sum, term) => sum + term.reduce((product, ref) => product * ref.value, 1), 0);
const sum = (name, terms, times = 1) => ({ name, terms, times, value: times * total(terms) });
const line = (name, text, value, refs = []) => ({ name, text, value, refs });
const added = (name, parts) => line(name, parts.map((part) => inner(part.value)).join(" + "), parts.reduce((a, part) => a + part.value, 0));

const KINDS = {
  embedding: {
    forward: {
      what: "Look up a vector for what each token is, and one for where it stands, and add them.",
      formula: "x[t] = wte[idx[t]] + wpe[t]",
      show: ["wte", "wpe"], give: ["x"],
      explain: (s, role, [t, c]) => [sum("token + position", [[s.ref("wte", DATA.idx[t], c)], [s.ref("wpe", t, c)]])],
    },
    backward: {
      what: "A row that was copied to several places gets the sum of their gradients. wte was used twice, to read tokens and as the head, so two gradients add up. Tokens that were not read and positions past the text get 0 here.",
      formula: "dwte[v] = Σ dx[t] where idx[t] = v,  + the head's dwte[v]      dwpe[t] = dx[t]",
      show: ["dx", "read", "head"], give: ["dwte", "dwpe"],
      explain(s, role, [i, c]) {
        if (role === "dwpe") return [sum("the position is used once", i < s.T ? [[s.ref("dx", i, c)]] : [])];
        const read = sum("where the token is read", range(s.T).filter((t) => DATA.idx[t] === i).map((t) => [s.ref("dx", t, c)]));
        return [read, sum("as the head", [[s.ref("head", i, c)]]), added("both uses", [read, s.ref("head", i, c)])];
      },
    },
  },
  fork: {
    names: ["x goes two ways", "dx + dbranch"],
    forward: {
      what: "The residual stream goes two ways from here: into the branch, and unchanged around it to the plus.",
      formula: "branch = f(x)      x = x + branch",
      show: [], give: ["x"],
      explain: (s, role, i) => [sum("used twice, as it is", [[s.ref("x", ...i)]])],
    },
    backward: {
      what: "x was used twice, so its gradient is a sum: what came around the branch, plus what came back through it. Through the branch alone, the gradient would shrink or grow at every layer.",
      formula: "dx = dx + dbranch",
      show: ["dsum", "dbranch"], give: ["dx"],
      explain: (s, role, i) => [sum("around + through the branch", [[s.ref("dsum", ...i)], [s.ref("dbranch", ...i)]])],
    },
  },
  layernorm: {
    forward: {
      what: "Give every token mean 0 and variance 1 over its channels, then a gain (weight) and a shift (bias).",
      formula: "xhat = (x − mean) · rstd,  rstd = 1/√(variance + 10⁻⁵)      out = xhat · weight + bias",
      show: ["x", "weight", "bias"], give: ["out"],
      explain(s, role, [t, c]) {
        const row = range(s.width("x")).map((i) => s.ref("x", t, i)), n = row.length;
        const mean = sum("mean", row.map((x) => [x]), 1 / n);
        const variance = row.reduce((a, x) => a + (x.value - mean.value) ** 2, 0) / n;
        const rstd = 1 / Math.sqrt(variance + 1e-5), xhat = (row[c].value - mean.value) * rstd;
        const w = s.ref("weight", c), b = s.has("bias") ? s.ref("bias", c) : { value: 0 };
        return [
          mean,
          line("variance", "mean of (x − mean)² along the row", variance),
          line("rstd", `1 / √(${num(variance)} + 10⁻⁵)`, rstd),
          line("xhat", `(${num(row[c].value)} − ${inner(mean.value)}) · ${num(rstd)}`, xhat),
          line("out", `${num(xhat)} · ${inner(w.value)} + ${inner(b.value)}`, xhat * w.value + b.value, [w, s.ref("x", t, c)]),
        ];
      },
    },
    backward: {
      what: "x acts on xhat in three ways: directly, through the mean and through the variance. Each gives dx one term.",
      formula: "dx = rstd · (dxhat − mean(dxhat) − xhat · mean(dxhat · xhat)),  dxhat = dout · weight",
      show: ["dout", "weight", "xhat", "rstd"], give: ["dx", "dweight", "dbias"],
      explain(s, role, [t, c]) {
        if (role === "dweight") return [sum("over all tokens", range(s.T).map((u) => [s.ref("dout", u, t), s.ref("xhat", u, t)]))];
        if (role === "dbias") return [sum("over all tokens", range(s.T).map((u) => [s.ref("dout", u, t)]))];
        const n = s.width("dout"), row = range(n).map((i) => [s.ref("dout", t, i), s.ref("weight", i)]);
        const a = sum("mean(dxhat)", row, 1 / n), b = sum("mean(dxhat · xhat)", row.map((term, i) => [...term, s.ref("xhat", t, i)]), 1 / n);
        const rstd = s.ref("rstd", t, 0), xhat = s.ref("xhat", t, c);
        const direct = line("1. directly", `rstd · dxhat = ${num(rstd.value)} · ${inner(total([row[c]]))}`, rstd.value * total([row[c]]), [rstd]);
        const mean = line("2. through the mean", `−rstd · mean(dxhat) = −${num(rstd.value)} · ${inner(a.value)}`, -rstd.value * a.value);
        const variance = line("3. through the variance", `−rstd · xhat · mean(dxhat · xhat) = −${num(rstd.value)} · ${inner(xhat.value)} · ${inner(b.value)}`, -rstd.value * xhat.value * b.value);
        return [a, b, direct, mean, variance, added("dx", [direct, mean, variance])];
      },
    },
  },
  linear: {
    forward: {
      what: "Every output is a dot product of a token's row with one row of the weight.",
      formula: "out = x @ weight.T + bias",
      show: ["x", "weight", "bias"], give: ["out"],
      explain: (s, role, [t, o]) => [
        sum("row · row", [...range(s.width("x")).map((i) => [s.ref("x", t, i), s.ref("weight", o, i)]), ...(s.has("bias") ? [[s.ref("bias", o)]] : [])]),
      ],
    },
    backward: {
      what: "A product: each factor's gradient is dout times the other factor, summed over the index that the factor does not have.",
      formula: "dx = dout @ weight      dweight = dout.T @ x      dbias = Σ over tokens of dout",
      show: ["dout", "weight", "x"], give: ["dx", "dweight", "dbias"],
      explain(s, role, [a, b]) {
        if (role === "dweight") return [sum("over all tokens", range(s.T).map((t) => [s.ref("dout", t, a), s.ref("x", t, b)]))];
        if (role === "dbias") return [sum("over all tokens", range(s.T).map((t) => [s.ref("dout", t, a)]))];
        const terms = range(s.width("dout")).map((o) => [s.ref("dout", a, o), s.ref("weight", o, b)]);
        if (!s.part.endsWith("c_attn")) return [sum("over all outputs that x fed", terms)];
        const third = terms.length / 3; // x was used three times: for q, k and v
        const paths = ["q", "k", "v"].map((name, i) => sum(`through ${name}`, terms.slice(i * third, (i + 1) * third)));
        return [...paths, added("q + k + v", paths)];
      },
    },
  },
  split: {
    names: ["cut into heads", "join heads"],
    forward: {
      what: "Cut each token's 3C numbers into query, key and value, and each of those into heads. Nothing is computed.",
      formula: "q, k, v = qkv.reshape(T, 3, nh, hs).transpose(1, 2, 0, 3)",
      show: ["qkv"], give: ["q", "k", "v"],
      explain: (s, role, [h, t, j]) => [sum("a copy", [[s.ref("qkv", t, "qkv".indexOf(role) * s.C + h * s.hs + j)]])],
    },
    backward: {
      what: "Put the gradients of all heads' queries, keys and values side by side again.",
      formula: "dqkv = (dq, dk, dv).transpose(2, 0, 1, 3).reshape(T, 3C)",
      show: ["dq", "dk", "dv"], give: ["dqkv"],
      explain(s, role, [t, o]) {
        const c = o % s.C;
        return [sum("a copy", [[s.ref("d" + "qkv"[Math.floor(o / s.C)], Math.floor(c / s.hs), t, c % s.hs)]])];
      },
    },
  },
  scores: {
    names: ["q @ k.T, mask", "dq, dk"],
    forward: {
      what: "How well does each key (column) fit each query (row)? The future is masked: no token may look ahead at what it has to predict.",
      formula: "att = mask(q @ k.T / √hs)",
      show: ["q", "k"], give: ["att"],
      explain(s, role, [h, t, u]) {
        const product = sum("query · key / √hs", range(s.hs).map((j) => [s.ref("q", h, t, j), s.ref("k", h, u, j)]), 1 / Math.sqrt(s.hs));
        return u <= t ? [product] : [product, line("masked", "the key is in the query's future", -Infinity)];
      },
    },
    backward: {
      what: "A product once more: dq is dscores times the keys, dk is dscores times the queries. Masked scores have the gradient 0, so they add nothing.",
      formula: "dq = datt @ k / √hs      dk = datt.T @ q / √hs",
      show: ["datt", "q", "k"], give: ["dq", "dk"],
      explain: (s, role, [h, t, j]) => [
        role === "dq"
          ? sum("over all keys", range(s.T).map((u) => [s.ref("datt", h, t, u), s.ref("k", h, u, j)]), 1 / Math.sqrt(s.hs))
          : sum("over all queries", range(s.T).map((u) => [s.ref("datt", h, u, t), s.ref("q", h, u, j)]), 1 / Math.sqrt(s.hs)),
      ],
    },
  },
  softmax: {
    forward: {
      what: "Turn each query's scores into shares: positive numbers that sum to 1. A masked score gets exactly 0.",
      formula: "probs = exp(att) / Σ exp(att) along the row",
      show: ["att"], give: ["probs"],
      explain: (s, role, [h, t, u]) => softmaxLines(range(s.T).map((i) => s.ref("att", h, t, i)), u),
    },
    backward: {
      what: "Shares sum to 1: if one grows, the others shrink. So what counts is by how much dprobs is above the row's average, weighted with the shares. A masked dprobs is not 0, but it is only used times probs = 0.",
      formula: "datt = probs · (dprobs − Σ dprobs · probs along the row)",
      show: ["dprobs", "probs"], give: ["datt"],
      explain(s, role, [h, t, u]) {
        const row = sum("the row's sum", range(s.T).map((i) => [s.ref("dprobs", h, t, i), s.ref("probs", h, t, i)]));
        const p = s.ref("probs", h, t, u).value, d = s.ref("dprobs", h, t, u).value;
        return [row, line("datt", `${num(p)} · (${num(d)} − ${inner(row.value)})`, p * (d - row.value))];
      },
    },
  },
  average: {
    names: ["probs @ v", "dprobs, dv"],
    forward: {
      what: "Each query gets the average of the values, weighted with its shares. Then the heads are put side by side: y.",
      formula: "y = probs @ v, for each head",
      show: ["probs", "v"], give: ["y"],
      explain(s, role, [t, c]) {
        const h = Math.floor(c / s.hs);
        return [sum("share · value", range(s.T).map((u) => [s.ref("probs", h, t, u), s.ref("v", h, u, c % s.hs)]))];
      },
    },
    backward: {
      what: "A product of two factors. A share's gradient says how well the value it let in would serve; masked ones have a gradient too, which the softmax's backward then multiplies by 0.",
      formula: "dprobs = dy @ v.T      dv = probs.T @ dy, for each head",
      show: ["dy", "v", "probs"], give: ["dprobs", "dv"],
      explain: (s, role, [h, t, u]) => [
        role === "dv"
          ? sum("over all queries", range(s.T).map((i) => [s.ref("probs", h, i, t), s.ref("dy", i, h * s.hs + u)]))
          : sum("gradient · value", range(s.hs).map((j) => [s.ref("dy", t, h * s.hs + j), s.ref("v", h, u, j)])),
      ],
    },
  },
  gelu: {
    forward: {
      what: "About 0 for very negative x, about x for large x. Without it, two linear layers would collapse into one.",
      formula: "out = x/2 · (1 + tanh(u)),  u = √(2/π) · (x + 0.044715 x³)",
      show: ["x"], give: ["out"],
      explain(s, role, index) {
        const x = s.ref("x", ...index), tanh = Math.tanh(geluInner(x.value));
        return [
          line("tanh(u)", `u = ${num(geluInner(x.value))}`, tanh),
          line("out", `${num(x.value)}/2 · (1 + ${inner(tanh)})`, 0.5 * x.value * (1 + tanh), [x]),
        ];
      },
    },
    backward: {
      what: "Element by element: dout times the slope of GELU at the saved x.",
      formula: "dx = dout · (½(1 + tanh) + x/2 · (1 − tanh²) · du/dx)",
      show: ["dout", "x"], give: ["dx"],
      explain(s, role, index) {
        const x = s.ref("x", ...index), d = s.ref("dout", ...index), tanh = Math.tanh(geluInner(x.value));
        const slope = Math.sqrt(2 / Math.PI) * (1 + 3 * 0.044715 * x.value ** 2);
        const gelu = 0.5 * (1 + tanh) + 0.5 * x.value * (1 - tanh * tanh) * slope;
        return [line("slope of GELU", `at x = ${num(x.value)}`, gelu, [x]), line("dx", `${num(d.value)} · ${inner(gelu)}`, d.value * gelu, [d])];
      },
    },
  },
  add: {
    names: ["x + branch", "dx, copied"],
    forward: {
      what: "The branch adds to the residual stream.",
      formula: "x = x + branch",
      show: ["x", "branch"], give: ["sum"],
      explain: (s, role, i) => [sum("stream + branch", [[s.ref("x", ...i)], [s.ref("branch", ...i)]])],
    },
    backward: {
      what: "A sum hands its gradient to both sides, unchanged: one copy goes into the branch, the other around it.",
      formula: "dbranch = dx",
      show: ["dsum"], give: ["dbranch"],
      explain: (s, role, i) => [sum("a copy", [[s.ref("dsum", ...i)]])],
    },
  },
  loss: {
    forward: {
      what: "Softmax makes probabilities of the scores. The loss is the mean surprise, −log p, at the tokens that really come next (framed).",
      formula: "probs = softmax(logits)      loss = mean of −log probs[t, target]",
      show: ["logits"], give: ["probs", "loss"],
      explain(s, role, [t, v]) {
        if (role === "probs") return softmaxLines(range(s.width("logits")).map((i) => s.ref("logits", t, i)), v);
        const refs = range(s.T).map((u) => s.ref("probs", u, DATA.targets[u]));
        const surprise = refs.map((p, u) => line(`−log p(${token(DATA.targets[u])})`, `−log ${num(p.value)}`, -Math.log(p.value), [p]));
        return [...surprise, line("loss", `their mean, over ${s.T} tokens`, surprise.reduce((a, l) => a + l.value, 0) / s.T)];
      },
    },
    backward: {
      what: "The gradient starts here: the probabilities, minus 1 at the target, divided by the number of tokens. Too sure of something false pushes down, too unsure of the truth pushes up.",
      formula: "dlogits = (probs − 1[v = target]) / T",
      show: ["probs"], give: ["dlogits"],
      explain(s, role, [t, v]) {
        const p = s.ref("probs", t, v), hit = Number(v === DATA.targets[t]);
        return [line("dlogits", `(${num(p.value)} − ${hit}) / ${s.T}`, (p.value - hit) / s.T, [p])];
      },
    },
  },
};

// What is particular about the linear layer of this name, forward and backward.
const NOTES = {
  "attn.c_attn": ["It makes all queries, keys and values at once.", "x was used three times, for q, k and v: three gradients add up."],
  "attn.c_proj": ["It mixes what the heads found.", ""],
  "mlp.c_fc": ["It makes each token four times as wide.", ""],
  "mlp.c_proj": ["It makes each token as narrow as the stream again.", ""],
  wte: ["This is the head: a token's score is the product of x with that token's own embedding.", "dweight is one of the two gradients of wte; the embedding brings the other."],
};

const geluInner = (x) => Math.sqrt(2 / Math.PI) * (x + 0.044715 * x * x * x);

function softmaxLines(row, i) {
  const max = Math.max(...row.map((ref) => ref.value));
  const exp = row.map((ref) => Math.exp(ref.value - max));
  const all = exp.reduce((a, b) => a + b);
  return [
    line("exp", `exp(${num(row[i].value)} − ${inner(max)}), less the row's maximum`, exp[i], row),
    line("the row's sum", exp.map((value) => num(value)).join(" + "), all),
    line("probs", `${num(exp[i])} / ${num(all)}`, exp[i] / all),
  ];
}
