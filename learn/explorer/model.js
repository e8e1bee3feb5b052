// numpygpt's forward pass once more, for one text, in float64: what the page computes when a weight is moved.
// A matrix is an array of rows, a row a Float64Array or an array of numbers.
"use strict";

function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}
const add = (x, y) => x.map((row, t) => row.map((value, c) => value + y[t][c]));
const rows = ({ shape: [n, width], data }) => Array.from({ length: n }, (_, i) => data.subarray(i * width, (i + 1) * width));

function layernorm(x, weight, bias) {
  return x.map((row) => {
    const mean = row.reduce((a, b) => a + b) / row.length;
    const variance = row.reduce((sum, value) => sum + (value - mean) ** 2, 0) / row.length;
    const rstd = 1 / Math.sqrt(variance + 1e-5);
    return row.map((value, c) => (value - mean) * rstd * weight.data[c] + (bias ? bias.data[c] : 0));
  });
}

function linear(x, weight, bias) {
  const w = rows(weight);
  return x.map((row) => w.map((weights, o) => dot(weights, row) + (bias ? bias.data[o] : 0)));
}

const gelu = (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x * x * x)));

function softmax(x) {
  const max = Math.max(...x);
  const exp = x.map((value) => Math.exp(value - max));
  const sum = exp.reduce((a, b) => a + b);
  return exp.map((value) => value / sum);
}

function attention(x, params, h, heads) {
  const C = x[0].length, hs = C / heads;
  const qkv = linear(x, params[h + "c_attn.weight"], params[h + "c_attn.bias"]);
  const cut = (t, which, head) => qkv[t].slice(which * C + head * hs, which * C + (head + 1) * hs);
  const y = x.map(() => []);
  for (let head = 0; head < heads; head++) {
    for (let t = 0; t < x.length; t++) {
      const seen = [...Array(t + 1).keys()]; // itself and the tokens before it: this is the mask
      const probs = softmax(seen.map((s) => dot(cut(t, 0, head), cut(s, 1, head)) / Math.sqrt(hs)));
      for (let j = 0; j < hs; j++) y[t].push(dot(probs, seen.map((s) => qkv[s][2 * C + head * hs + j])));
    }
  }
  return linear(y, params[h + "c_proj.weight"], params[h + "c_proj.bias"]);
}

function forward(params, config, idx, targets) {
  const p = (name) => params[name]; // undefined for a bias that the model does not have
  const wte = rows(p("wte.weight")), wpe = rows(p("wpe.weight"));
  let x = idx.map((id, t) => Array.from(wte[id], (value, c) => value + wpe[t][c]));
  for (let i = 0; i < config.n_layer; i++) {
    const h = `h.${i}.`;
    x = add(x, attention(layernorm(x, p(h + "ln_1.weight"), p(h + "ln_1.bias")), params, h + "attn.", config.n_head));
    const fc = linear(layernorm(x, p(h + "ln_2.weight"), p(h + "ln_2.bias")), p(h + "mlp.c_fc.weight"), p(h + "mlp.c_fc.bias"));
    x = add(x, linear(fc.map((row) => row.map(gelu)), p(h + "mlp.c_proj.weight"), p(h + "mlp.c_proj.bias")));
  }
  const logits = linear(layernorm(x, p("ln_f.weight"), p("ln_f.bias")), p("wte.weight"));
  const probs = logits.map(softmax);
  const loss = probs.reduce((sum, row, t) => sum - Math.log(row[targets[t]]), 0) / idx.length;
  return { logits, probs, loss };
}
