// What the reader sees and does: the column, a step with its tables, the chosen cell, and a weight that moves.
"use strict";

const $ = (id) => document.getElementById(id);
const TENSORS = Object.fromEntries(Object.entries(ENCODED).map(([name, { shape, base64 }]) => {
  const bytes = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
  return [name, { shape, data: new Float64Array(bytes.buffer) }];
}));
const token = (id) => DATA.tokens[id];

/** A new element: make("td", { className: "x" }, children or text...) */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function num(value, digits = 4) {
  if (!Number.isFinite(value)) return value < 0 ? "−∞" : "∞";
  const small = value !== 0 && Math.abs(value) < 1e-3;
  return (small ? value.toExponential(digits - 1) : String(Number(value.toPrecision(digits)))).replaceAll("-", "−");
}

/** As a number in the middle of a formula. */
const inner = (value) => (value < 0 ? `(${num(value)})` : num(value));

/** h.0.attn.qkv -> h.0.attn.dqkv, as in learn/trace.py */
const gradientName = (name) => name.replace(/^(\S*\.)?(\S+)/, (all, path = "", variable) => `${path}d${variable}`);

/** One step in one direction. Roles are the names that tensors have in the step's function: x, weight, dout. */
class Step {
  constructor(raw, direction) {
    Object.assign(this, raw, { direction, code: raw[direction] }, KINDS[raw.kind][direction]);
    this.T = DATA.idx.length;
    this.C = DATA.config.n_embd;
    this.hs = this.C / DATA.config.n_head;
    const caption = KINDS[raw.kind].names;
    this.name = caption ? caption[Number(direction === "backward")] : this.code[0].function;
  }

  tensor(role) {
    return this.tensors[role] ?? gradientName(this.tensors[role.slice(1)] ?? "none");
  }

  has(role) {
    return this.tensor(role) in TENSORS;
  }

  width(role) {
    return TENSORS[this.tensor(role)].shape.at(-1);
  }

  ref(role, ...index) {
    const { shape, data } = TENSORS[this.tensor(role)];
    const value = data[index.reduce((place, i, axis) => place * shape[axis] + i, 0)];
    return { key: `${role}[${index.join(", ")}]`, value };
  }
}

const SEQUENCE = [...DATA.steps.map((raw) => new Step(raw, "forward")), ...DATA.steps.map((raw) => new Step(raw, "backward")).reverse()];
let current = 0;
let timer = null;
let cells = new Map(); // key -> the cell in the step's tables
let pinned = null; // the cell that was clicked: until it is clicked again, the pointer chooses no other

// --------------------------------------------------------------------------------------------------------------------
// Tables of numbers

/** What stands along an axis of length n: tokens of the text (T), of the vocabulary (V), or numbers. */
function axisLabels(name, shape) {
  const text = DATA.idx.map(token);
  const number = (n) => range(n).map(String);
  const bare = name.replace(/\bd(?=[a-z])/, "");
  if (bare === "logits" || bare === "probs") return [text, DATA.tokens];
  if (bare.startsWith("wte.")) return [DATA.tokens, number(shape[1])];
  if (/\.(att|probs)$/.test(bare)) return [text, text];
  const parameter = /\.(weight|bias)/.test(bare);
  return [shape.length < 2 ? [""] : parameter ? number(shape.at(-2)) : text, shape.length ? number(shape.at(-1)) : [""]];
}

/** The factor of ten that a table leaves out, so that its numbers are short. */
function exponentOf(data) {
  const largest = data.reduce((max, value) => (Number.isFinite(value) ? Math.max(max, Math.abs(value)) : max), 0);
  const exponent = largest === 0 || (largest >= 0.1 && largest < 100) ? 0 : Math.floor(Math.log10(largest));
  return { largest, exponent };
}

function short(value, exponent, largest) {
  if (!Number.isFinite(value)) return "−∞";
  const text = (value / 10 ** exponent).toFixed(largest / 10 ** exponent >= 10 ? 1 : 2);
  if (Number(text) === 0) return value === 0 ? "0" : "~0";
  return text.replace(/^(-?)0\./, "$1.").replace("-", "−");
}

/** A figure with the tensor's numbers; onto(key, cell) is called for each of them. */
function heatmap(role, name, className, onto) {
  const { shape, data } = TENSORS[name];
  const { largest, exponent } = exponentOf(data);
  const [rowLabels, columnLabels] = axisLabels(name, shape);
  const [height, width] = [rowLabels.length, columnLabels.length];
  const scale = exponent ? [" ×10", make("sup", {}, String(exponent).replace("-", "−"))] : [];
  const caption = make("figcaption", {}, make("b", {}, role), ` (${shape.join(", ")})`, ...scale, make("small", {}, name));
  const tables = range(shape.length === 3 ? shape[0] : 1).map((head) => {
    const top = make("tr", {}, make("th", {}, shape.length === 3 ? `head ${head}` : ""), ...columnLabels.map((label) => make("th", { scope: "col" }, label)));
    const body = range(height).map((i) => make("tr", {}, make("th", { scope: "row" }, rowLabels[i]), ...range(width).map((j) => {
      const value = data[(head * height + i) * width + j];
      const index = [head, i, j].slice(3 - shape.length);
      const cell = make("td", { tabIndex: i + j ? -1 : 0, className: value < 0 ? "negative" : "positive" }, short(value, exponent, largest));
      cell.style.setProperty("--share", `${largest && Number.isFinite(value) ? (100 * Math.abs(value)) / largest : 0}%`);
      Object.assign(cell.dataset, { role, index: index.join(",") });
      if (role === "probs" && shape.length === 2 && DATA.targets[i] === j) cell.classList.add("target");
      onto(`${role}[${index.join(", ")}]`, cell);
      return cell;
    })));
    return make("table", {}, top, ...body);
  });
  return make("figure", { className }, caption, make("div", { className: "tables" }, ...tables));
}

/** In a table, the arrow keys go to the neighbouring cell. */
function moveInTable(event) {
  if (event.key === "Escape") return event.target.blur();
  const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (event.target.tagName !== "TD" || !by) return;
  event.preventDefault();
  const row = event.target.parentElement;
  const next = row.parentElement.rows?.[row.rowIndex + by[0]] ?? row.closest("table").rows[row.rowIndex + by[0]];
  const cell = next?.cells[event.target.cellIndex + by[1]];
  if (cell?.tagName === "TD") cell.focus();
}

// --------------------------------------------------------------------------------------------------------------------
// The steps

function go(index) {
  current = Math.max(0, Math.min(SEQUENCE.length - 1, index));
  const step = SEQUENCE[current];
  document.querySelectorAll("#column button").forEach((button) => button.setAttribute("aria-current", button.dataset.index === String(current) ? "step" : "false"));
  const here = document.querySelector("#column [aria-current=step]");
  $("column").scrollTop = here.offsetTop - $("column").clientHeight / 2;
  $("where").textContent = `${step.direction}, ${current + 1} of ${SEQUENCE.length}`;
  $("title").replaceChildren(step.direction === "forward" ? "↓ " : "↑ ", step.name, make("small", {}, step.part));
  const note = step.kind === "linear" ? NOTES[step.part.replace(/^h\.\d+\./, "")] : ["", ""];
  $("what").textContent = `${step.what} ${note[Number(step.direction === "backward")]}`;
  $("formula").textContent = step.formula;
  [cells, pinned] = [new Map(), null];
  const figures = (roles, className) => roles.filter((role) => step.has(role)).map((role) => heatmap(role, step.tensor(role), className, (key, cell) => cells.set(key, cell)));
  $("maps").replaceChildren(
    make("div", { className: "maps in" }, ...figures(step.show, "in")),
    make("div", { className: "flow" }, step.direction === "forward" ? "↓ gives" : "↑ gives"),
    make("div", { className: "maps out" }, ...figures(step.give, "out")),
  );
  $("code").replaceChildren(...step.code.map(codeOf));
  const first = step.tensor(step.give[0]), { shape, data } = TENSORS[first];
  const place = data.reduce((best, value, i) => (Number.isFinite(value) && Math.abs(value) > Math.abs(data[best]) ? i : best), 0);
  choose(step.give[0], shape.map((_, axis) => Math.floor(place / shape.slice(axis + 1).reduce((a, b) => a * b, 1)) % shape[axis]));
}

/** The lines of a place in numpygpt.py: the first place of a step in its whole function, marked. */
function codeOf(place, number) {
  const marked = ([line]) => line >= place.first && line <= place.last;
  const whole = DATA.functions[place.function];
  const lines = (number === 0 || place.last - place.first > 3 ? whole : whole.filter(marked)).map((line) => make(marked(line) ? "mark" : "span", {}, `${String(line[0]).padStart(4)}  ${line[1]}\n`));
  return make("pre", { tabIndex: 0 }, ...(number ? [make("span", { className: "caller" }, `      called in ${place.function}:\n`)] : []), ...lines);
}

/** Point at a number of the step: say where it comes from, and frame what it is made of. */
function choose(role, index) {
  const step = SEQUENCE[current], key = `${role}[${index.join(", ")}]`, cell = cells.get(key);
  cells.forEach((other) => other.classList.remove("chosen", "source"));
  cell?.classList.add("chosen");
  const made = step.give.includes(role);
  const lines = made ? step.explain(step, role, index) : [];
  for (const { key: source } of lines.flatMap(({ terms, refs }) => (terms ? terms.flat() : refs))) cells.get(source)?.classList.add("source");
  const value = step.ref(role, ...index).value;
  const title = make("p", {}, make("b", {}, key), ` = ${num(value, 10)}`, made ? "" : " goes in here", make("small", {}, pinned ? "fixed; click it again to let go" : "click a cell to keep it"));
  const parameter = step.tensor(role).replace(/\bd(?=(weight|bias)\b)/, "").replace(/ \(.*/, "");
  if (/\.(weight|bias)$/.test(parameter)) title.append(" ", make("button", { onclick: () => grab(parameter, index, true) }, "move this weight"));
  $("explain").replaceChildren(title, ...lines.map(show));
}

function show({ name, terms, times, text, value }) {
  const result = make("span", { className: "result" }, ` = ${num(value, 6)}`);
  if (!terms) return make("p", {}, make("i", {}, name), " ", text, result);
  const chips = terms.map((term) => make("span", { className: total([term]) < 0 ? "term negative" : "term positive", title: term.map((ref) => ref.key).join(" · ") }, make("small", {}, term.map((ref) => ref.key).join(" · ")), term.map((ref) => num(ref.value, 3)).join(" · ")));
  const factor = times === 1 ? [] : [`${num(times)} · (`, ")"];
  return make("p", {}, make("i", {}, name), " ", factor[0] ?? "", ...(chips.length ? chips : ["nothing"]), factor[1] ?? "", result);
}

function drawColumn() {
  const n = DATA.steps.length;
  $("column").append(make("p", {}, make("span", {}, "forward ↓"), make("span", {}, "↑ backward")));
  DATA.steps.forEach((raw, row) => {
    const button = (index) => make("button", { onclick: () => go(index) }, SEQUENCE[index].name);
    const [down, up] = [button(row), button(2 * n - 1 - row)];
    [down.dataset.index, up.dataset.index] = [row, 2 * n - 1 - row];
    const depth = /\.attn|\.mlp/.test(raw.part) && raw.kind !== "add" ? "deep" : /^h\./.test(raw.part) ? "block" : "";
    $("column").append(make("div", { className: depth }, down, make("span", {}, raw.part), up));
  });
}

function play(on) {
  clearInterval(timer);
  timer = on ? setInterval(() => (current + 1 < SEQUENCE.length ? go(current + 1) : play(false)), 1500) : null;
  $("play").textContent = on ? "pause" : "play";
  $("play").setAttribute("aria-pressed", on);
}

// --------------------------------------------------------------------------------------------------------------------
// A weight that moves

const PARAMETERS = Object.keys(TENSORS).filter((name) => /\.(weight|bias)$/.test(name));
let held = { name: "", place: 0, before: 0, gradient: 0, reach: 1 };
let position = DATA.idx.length - 1; // of the token whose whole distribution is shown

/** The model's answer if the held weight were `value`. */
function lossAt(value) {
  const { data } = TENSORS[held.name];
  data[held.place] = value;
  const result = forward(TENSORS, DATA.config, DATA.idx, DATA.targets);
  data[held.place] = held.before;
  return result;
}

function grab(name, index, scroll = false) {
  const { shape, data } = TENSORS[name];
  const place = index.reduce((sum, i, axis) => sum * shape[axis] + i, 0);
  const label = `${name}[${index.join(", ")}]`;
  const reach = Math.max(0.5, data.reduce((max, value) => Math.max(max, Math.abs(value)), 0));
  held = { name, place, label, reach, before: data[place], gradient: TENSORS[gradientName(name)].data[place] };
  $("parameter").value = name;
  const short = name.split(".").at(-1), found = [];
  const onto = (key, cell) => key.endsWith(`[${index.join(", ")}]`) && found.push(cell);
  $("weights").replaceChildren(heatmap(short, name, "out", onto), heatmap(`d${short}`, gradientName(name), "out", onto));
  found.forEach((cell) => cell.classList.add("chosen"));
  const start = performance.now();
  held.now = lossAt(held.before);
  const points = Math.max(13, Math.min(81, Math.round(150 / (performance.now() - start)))); // a large model gets fewer
  held.curve = range(points).map((i) => held.before + reach * ((2 * i) / (points - 1) - 1)).map((w) => [w, lossAt(w).loss]);
  Object.assign($("move"), { min: held.before - reach, max: held.before + reach, step: reach / 200, value: held.before });
  move(held.before);
  if (scroll) $("grab").scrollIntoView();
  if (scroll) $("move").focus({ preventScroll: true });
}

function move(value) {
  const { before, gradient, now, label } = held, then = lossAt(value);
  const predicted = now.loss + gradient * (value - before);
  $("weight").textContent = `${label} = ${num(value)} `;
  $("readout").replaceChildren(
    `loss ${num(now.loss, 6)} → `, make("b", {}, num(then.loss, 6)), `. The gradient is ${num(gradient)}, so for a move of ${num(value - before)} it predicts `,
    make("b", {}, num(predicted, 6)), `: ${num(Math.abs(then.loss - predicted), 2)} off.`,
  );
  drawCurve(value, then.loss, predicted);
  const pick = (t) => () => { position = t; move(Number($("move").value)); };
  $("surprise").replaceChildren(...DATA.targets.map((target, t) => bar(`${token(DATA.idx[t])} → ${token(target)}`, then.probs[t][target], now.probs[t][target], pick(t), t === position)));
  $("after").textContent = `what may follow “${DATA.idx.slice(0, position + 1).map(token).join("")}”`;
  $("next-token").replaceChildren(...DATA.tokens.map((name, v) => [name, v]).sort(([, a], [, b]) => now.probs[position][b] - now.probs[position][a]).slice(0, 16).map(([name, v]) => bar(name, then.probs[position][v], now.probs[position][v])));
}

function bar(label, value, before, onclick = null, pressed = false) {
  const fill = make("span", { className: "bar" }, make("span"), make("span"));
  fill.children[0].style.width = `${100 * value}%`;
  fill.children[1].style.left = `${100 * before}%`;
  const row = make(onclick ? "button" : "div", { className: "row", onclick }, make("span", {}, label), fill, make("span", {}, value.toFixed(3)));
  if (onclick) row.setAttribute("aria-pressed", pressed);
  return row;
}

function drawCurve(value, loss, predicted) {
  const { curve, before, gradient, now, reach } = held;
  const losses = curve.map(([, y]) => y), low = Math.min(...losses), room = Math.max(Math.max(...losses) - low, 2 * reach * Math.abs(gradient), 1e-9) * 0.1;
  const high = Math.max(...losses) + room, x = (w) => 50 + (380 * (w - before + reach)) / (2 * reach), y = (l) => 230 - (220 * (l - low + room)) / (high - low + room);
  const at = (w) => now.loss + gradient * (w - before), [left, right] = [before - reach, before + reach];
  $("curve").innerHTML = `<clipPath id="inside"><rect x="50" y="5" width="380" height="226"/></clipPath>
    <path class="axis" d="M50 5V231H430"/>
    <text x="46" y="${y(low)}" text-anchor="end">${num(low, 3)}</text><text x="46" y="20" text-anchor="end">${num(high, 3)}</text>
    <text x="50" y="250">${num(left, 3)}</text><text x="240" y="250" text-anchor="middle">${num(before, 3)}</text><text x="430" y="250" text-anchor="end">${num(right, 3)}</text>
    <g clip-path="url(#inside)"><path class="loss" d="M${curve.map(([w, l]) => `${x(w)} ${y(l)}`).join("L")}"/>
    <line class="tangent" data-slope="${gradient}" x1="${x(left)}" y1="${y(at(left))}" x2="${x(right)}" y2="${y(at(right))}"/>
    <path class="miss" d="M${x(value)} ${y(loss)}V${y(predicted)}"/>
    <circle class="was" cx="${x(before)}" cy="${y(now.loss)}" r="4"/><circle class="is" cx="${x(value)}" cy="${y(loss)}" r="6"/></g>`;
}

// --------------------------------------------------------------------------------------------------------------------
// What the reader does

const indexOf = (cell) => cell.dataset.index.split(",").filter(Boolean).map(Number);

for (const type of ["pointerover", "focusin", "click"]) {
  $("maps").addEventListener(type, ({ target }) => {
    if (target.dataset.index === undefined || (pinned && type === "pointerover")) return;
    if (type === "click") pinned = pinned === target ? null : target;
    choose(target.dataset.role, indexOf(target));
  });
}
$("weights").addEventListener("click", ({ target }) => target.dataset.index !== undefined && grab(held.name, indexOf(target)));
$("weights").addEventListener("keydown", (event) => event.key === "Enter" && event.target.dataset.index !== undefined && grab(held.name, indexOf(event.target), true));
$("maps").addEventListener("keydown", moveInTable);
$("weights").addEventListener("keydown", moveInTable);
$("parameter").addEventListener("change", ({ target }) => grab(target.value, TENSORS[target.value].shape.map(() => 0)));
$("move").addEventListener("input", ({ target }) => move(Number(target.value)));
$("back").addEventListener("click", () => { $("move").value = held.before; move(held.before); });
$("previous").addEventListener("click", () => go(current - 1));
$("next").addEventListener("click", () => go(current + 1));
$("play").addEventListener("click", () => play(timer === null));
document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.altKey || event.metaKey || event.target.closest("td, input, select")) return;
  const to = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: SEQUENCE.length - 1 }[event.key];
  if (to !== undefined) go(to);
  else if (event.key === " " && !event.target.closest("button, a")) play(timer === null);
  else return;
  event.preventDefault();
});

$("text").textContent = `“${DATA.idx.map(token).join("")}”`;
$("truth").textContent = `“${DATA.targets.map(token).join("")}”`;
$("size").textContent = `It has ${DATA.config.n_layer} layer${DATA.config.n_layer > 1 ? "s" : ""}, ${DATA.config.n_head} heads, ${DATA.config.n_embd} channels and ${DATA.tokens.length} different tokens.`;
$("parameter").append(...PARAMETERS.map((name) => make("option", {}, name)));
drawColumn();
go(0);
grab("wte.weight", [DATA.idx.at(-1), 0]);
