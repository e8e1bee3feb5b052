// What the reader sees and does: the column, a step with its tables, the chosen cell, and a weight that moves.
"use strict";

const $ = (id) => document.getElementById(id);
const TENSORS = Object.fromEntries(Object.entries(ENCODED).map(([name, { shape, base64 }]) => {
  const bytes = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
  return [name, { shape, data: new Float64Array(bytes.buffer) }];
}));
const text = (ids) => `“${ids.map((id) => DATA.tokens[id]).join("")}”`;
const keyOf = (role, index) => `${role}[${index.join(", ")}]`;
const placeOf = (index, shape) => index.reduce((place, i, axis) => place * shape[axis] + i, 0);
const indexAt = (place, shape) =>
  shape.map((n, axis) => Math.floor(place / shape.slice(axis + 1).reduce((a, b) => a * b, 1)) % n);
const indexOf = (cell) => cell.dataset.index.split(",").filter(Boolean).map(Number);
const escape = (text) => text.replace(/[&<>"]/g, (char) => `&#${char.charCodeAt(0)};`);
const largestOf = (data) => data.reduce((max, x) => (Number.isFinite(x) ? Math.max(max, Math.abs(x)) : max), 0);

/** A new element with these properties and children. */
function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function num(value, digits = 4) {
  if (!Number.isFinite(value)) return value < 0 ? "−∞" : "∞";
  const small = value !== 0 && Math.abs(value) < 1e-3;
  return (small ? value.toExponential(digits - 1) : String(Number(value.toPrecision(digits)))).replaceAll("-", "−");
}

/** The same in the middle of a formula. */
const inner = (value) => (value < 0 ? `(${num(value)})` : num(value));

/** h.0.attn.qkv -> h.0.attn.dqkv, as in learn/trace.py */
const gradientName = (name) => name.replace(/^(\S*\.)?(\S+)/, (all, path = "", variable) => `${path}d${variable}`);

/** One step in one direction. Roles are the names that tensors have in the step's function: x, weight, dout. */
class Step {
  constructor(raw, direction) {
    Object.assign(this, raw, { direction, code: raw[direction] }, KINDS[raw.kind][direction]);
    [this.T, this.C, this.hs] = [DATA.idx.length, DATA.config.n_embd, DATA.config.n_embd / DATA.config.n_head];
    const { names, what } = KINDS[raw.kind], way = Number(direction === "backward");
    this.name = names?.[way] ?? this.code[0].function;
    this.what = what?.[way] ?? DATA.functions[this.code[0].function][0];
  }
  tensor(role) {
    return this.tensors[role] ?? gradientName(this.tensors[role.slice(1)]);
  }
  has(role) {
    return this.tensor(role) in TENSORS;
  }
  width(role) {
    return TENSORS[this.tensor(role)].shape.at(-1);
  }
  ref(role, ...index) {
    const { shape, data } = TENSORS[this.tensor(role)];
    return { key: keyOf(role, index), value: data[placeOf(index, shape)] };
  }
  overTokens(term, times) {
    return sum("over all tokens", range(this.T).map(term), times);
  }
}

const SEQUENCE = DATA.steps.map((raw) => new Step(raw, "forward"));
SEQUENCE.push(...DATA.steps.map((raw) => new Step(raw, "backward")).reverse());
let current = 0;
let timer = null;
let cells = new Map(); // key -> the cell in the step's tables
let pinned = null; // the cell that was clicked: until it is clicked again, the pointer chooses no other

// --------------------------------------------------------------------------------------------------------------------
// Tables of numbers

/** What stands beside the rows and above the columns: tokens of the text, of the vocabulary, or numbers. */
function labelsOf(name, shape) {
  const tokens = DATA.idx.map((id) => DATA.tokens[id]), bare = name.replace(/\bd(?=[a-z])/, "");
  const numbers = (n) => range(n).map(String);
  if (bare === "logits" || bare === "probs") return [tokens, DATA.tokens];
  if (bare.startsWith("wte.")) return [DATA.tokens, numbers(shape[1])];
  if (/\.(att|probs)$/.test(bare)) return [tokens, tokens];
  const rows = shape.length < 2 ? [""] : /\.weight/.test(bare) ? numbers(shape[0]) : tokens;
  return [rows, shape.length ? numbers(shape.at(-1)) : [""]];
}

function short(value, exponent, digits) {
  if (!Number.isFinite(value)) return "−∞";
  const written = (value / 10 ** exponent).toFixed(digits);
  if (Number(written) === 0) return value === 0 ? "0" : "~0";
  return written.replace(/^(-?)0\./, "$1.").replace("-", "−");
}

/** A figure with a tensor's numbers; found(key, cell) is called for each of them. */
function heatmap(role, name, found) {
  const { shape, data } = TENSORS[name], [rowLabels, columnLabels] = labelsOf(name, shape), largest = largestOf(data);
  const exponent = largest === 0 || (largest >= 0.1 && largest < 100) ? 0 : Math.floor(Math.log10(largest));
  const digits = largest / 10 ** exponent >= 10 ? 1 : 2; // so that no number is longer than −12.3 or −.12
  const cell = (head, i, j) => {
    const value = data[(head * rowLabels.length + i) * columnLabels.length + j];
    const share = Number.isFinite(value) && largest ? (100 * Math.abs(value)) / largest : 0;
    const classes = [value < 0 ? "negative" : "positive", name === "probs" && DATA.targets[i] === j ? "target" : ""];
    return `<td tabindex="${i + j ? -1 : 0}" class="${classes.join(" ")}" style="--share: ${share}%" data-role="${role}"
      data-index="${[head, i, j].slice(3 - shape.length)}">${short(value, exponent, digits)}</td>`;
  };
  const top = columnLabels.map((label) => `<th scope="col">${escape(label)}</th>`).join("");
  const tables = range(shape.length === 3 ? shape[0] : 1).map((head) => {
    const row = (label, i) => `<tr><th>${escape(label)}</th>${columnLabels.map((_, j) => cell(head, i, j)).join("")}</tr>`;
    const corner = shape.length === 3 ? `head ${head}` : "";
    return `<table><tr><th>${corner}</th>${top}</tr>${rowLabels.map(row).join("")}</table>`; // far faster than make()
  });
  const scale = exponent ? ` ×10<sup>${String(exponent).replace("-", "−")}</sup>` : "";
  const axes = /^d?(att|probs)$/.test(role) && shape.length === 3 ? " query ↓ key →" : "";
  const caption = `<figcaption><b>${role}</b> (${shape.join(", ")})${scale}${axes}<small>${name}</small></figcaption>`;
  const figure = make("figure", { innerHTML: `${caption}<div class="tables">${tables.join("")}</div>` });
  figure.querySelectorAll("td").forEach((cell) => found(keyOf(role, indexOf(cell)), cell));
  return figure;
}

/** In a table, the arrow keys go to the neighbouring cell, and Esc leaves. */
function moveInTable(event) {
  const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (event.key === "Escape") event.target.blur();
  if (event.target.tagName !== "TD" || !by) return;
  event.preventDefault();
  const row = event.target.closest("table").rows[event.target.parentElement.rowIndex + by[0]];
  const cell = row?.cells[event.target.cellIndex + by[1]];
  if (cell?.tagName === "TD") cell.focus();
}

// --------------------------------------------------------------------------------------------------------------------
// The steps

function drawColumn() {
  const button = (index) => make("button", { onclick: () => go(index), id: `step-${index}` }, SEQUENCE[index].name);
  $("column").append(make("p", {}, make("span", {}, "forward ↓"), make("span", {}, "↑ backward")));
  DATA.steps.forEach(({ kind, part }, i) => {
    const className = /\.attn|\.mlp/.test(part) && kind !== "add" ? "deep" : /^h\./.test(part) ? "block" : "";
    $("column").append(make("div", { className }, button(i), make("span", {}, part), button(SEQUENCE.length - 1 - i)));
  });
}

function go(index) {
  $(`step-${current}`).removeAttribute("aria-current");
  current = Math.max(0, Math.min(SEQUENCE.length - 1, index));
  const step = SEQUENCE[current], button = $(`step-${current}`), arrow = step.direction === "forward" ? "↓" : "↑";
  button.setAttribute("aria-current", "step");
  $("column").scrollTop = button.offsetTop - $("column").clientHeight / 2;
  $("where").textContent = `${step.direction}, ${current + 1} of ${SEQUENCE.length}`;
  $("title").replaceChildren(`${arrow} ${step.name}`, make("small", {}, step.part));
  $("formula").textContent = step.formula;
  $("what").textContent = step.what;
  [cells, pinned] = [new Map(), null];
  const draw = (role) => heatmap(role, step.tensor(role), (key, cell) => cells.set(key, cell));
  $("show").replaceChildren(...step.show.filter((role) => step.has(role)).map(draw));
  $("gives").textContent = `${arrow} gives`;
  $("give").replaceChildren(...step.give.filter((role) => step.has(role)).map(draw));
  $("code").replaceChildren(...step.code.map(codeOf));
  const { shape, data } = TENSORS[step.tensor(step.give[0])], largest = largestOf(data); // chosen at first
  choose(step.give[0], indexAt(data.findIndex((value) => Math.abs(value) === largest), shape));
}

/** The lines of a place in numpygpt.py: of a step's first place the whole function, with the lines marked. */
function codeOf(place, number) {
  const marked = ([line]) => line >= place.first && line <= place.last;
  const lines = DATA.functions[place.function][1].filter((line) => number === 0 || marked(line));
  const caption = number === 0 ? "" : make("small", {}, `and in ${place.function}:\n`);
  const written = ([line, code]) => `${String(line).padStart(4)}  ${code}\n`;
  return make("pre", { tabIndex: 0 }, caption, ...lines.map((line) => make(marked(line) ? "mark" : "span", {}, written(line))));
}

/** Point at a number of the step: say where it comes from, and frame what it is made of. */
function choose(role, index) {
  const step = SEQUENCE[current], key = keyOf(role, index), given = step.give.includes(role);
  const lines = given ? step.explain(step, role, index) : [];
  cells.forEach((cell) => cell.classList.remove("chosen", "source"));
  cells.get(key).classList.add("chosen");
  for (const ref of lines.flatMap(({ terms, refs }) => refs ?? terms.flat())) cells.get(ref.key)?.classList.add("source");
  const value = ` = ${num(step.ref(role, ...index).value, 10)}${given ? "" : ", goes in here"}`;
  const title = make("p", {}, make("b", {}, key), value, make("small", {}, pinned ? "click it again to let go" : "click a cell to keep it"));
  const parameter = step.tensor(role).replace(/\bd(?=(weight|bias)\b)/, "").replace(/ \(.*/, "");
  if (PARAMETERS.includes(parameter)) {
    title.append(make("button", { onclick: () => { grab(parameter, index); $("grab").scrollIntoView(); $("move").focus(); } }, "move this weight"));
  }
  $("explain").replaceChildren(title, ...lines.map(show));
}

/** A line of an explanation; each term of a sum with its sign's colour. */
function show({ name, terms, times, text, value }) {
  const sign = (value) => (value === 0 ? "" : value < 0 ? "negative" : "positive");
  const term = (refs) => make("span", { className: `term ${sign(product(refs))}` },
    make("small", {}, refs.map((ref) => ref.key).join(" · ")), refs.map((ref) => num(ref.value, 3)).join(" · "));
  const made = !terms ? [text] : terms.length ? terms.map(term) : ["nothing"];
  const factor = (terms && times !== 1) ? [`${num(times)} · (`, ")"] : ["", ""];
  return make("p", {}, make("i", {}, name), ` ${factor[0]}`, ...made, `${factor[1]} = ${num(value, 6)}`);
}

function play(on) {
  clearInterval(timer);
  timer = on ? setInterval(() => (current + 1 < SEQUENCE.length ? go(current + 1) : play(false)), 1500) : null;
  $("play").textContent = on ? "pause" : "play";
}

// --------------------------------------------------------------------------------------------------------------------
// A weight that moves

const PARAMETERS = Object.keys(TENSORS).filter((name) => /\.(weight|bias)$/.test(name));
let held = {}; // the weight, and what is true where it was before it moved
const trueProbs = DATA.targets.map((id, t) => TENSORS.probs.data[t * DATA.tokens.length + id]);
let position = trueProbs.indexOf(Math.min(...trueProbs)); // after this token all probabilities are shown

/** The model's answer if the held weight were `value`. */
function answer(value) {
  const { data } = TENSORS[held.name];
  data[held.place] = value;
  const result = forward(TENSORS, DATA.config, DATA.idx, DATA.targets);
  data[held.place] = held.before;
  return result;
}

function grab(name, index) {
  const { shape, data } = TENSORS[name], place = placeOf(index, shape), before = data[place];
  held = { name, index, place, before, gradient: TENSORS[gradientName(name)].data[place], reach: Math.max(0.5, largestOf(data)) };
  $("parameter").value = name;
  const mark = (key, cell) => key.endsWith(keyOf("", index)) && cell.classList.add("chosen");
  $("weights").replaceChildren(heatmap("weight", name, mark), heatmap("gradient", gradientName(name), mark));
  held.cell = $("weights").querySelector(".chosen");
  const start = performance.now();
  held.then = answer(before);
  const points = Math.max(13, Math.min(81, Math.round(150 / (performance.now() - start)))); // a large model gets fewer
  held.curve = range(points).map((i) => before + held.reach * ((2 * i) / (points - 1) - 1)).map((w) => [w, answer(w).loss]);
  Object.assign($("move"), { min: before - held.reach, max: before + held.reach, step: held.reach / 200, value: before });
  move(before);
}

function move(value) {
  const { before, gradient, then } = held, now = answer(value);
  const predicted = then.loss + gradient * (value - before);
  $("weight").textContent = `${keyOf(held.name, held.index)} = ${num(value)}`;
  held.cell.textContent = num(value, 2);
  $("readout").replaceChildren(
    `The loss was ${num(then.loss, 6)} and is `, make("b", {}, num(now.loss, 6)),
    `. The gradient, ${num(gradient)}, predicts for a move of ${num(value - before)}: `, make("b", {}, num(predicted, 6)), ".");
  drawCurve(value, now.loss, predicted);
  $("targets").replaceChildren(...DATA.targets.map((id, t) => {
    const row = bar("button", `${DATA.tokens[DATA.idx[t]]} → ${DATA.tokens[id]}`, now.probs[t][id], then.probs[t][id]);
    row.setAttribute("aria-pressed", t === position);
    row.onclick = () => { position = t; move(value); };
    return row;
  }));
  const [probs, past] = [now.probs[position], then.probs[position]];
  const likeliest = range(probs.length).sort((a, b) => past[b] - past[a]).slice(0, 16);
  $("after").textContent = `what may follow ${text(DATA.idx.slice(0, position + 1))}`;
  $("following").replaceChildren(...likeliest.map((id) => bar("div", DATA.tokens[id], probs[id], past[id])));
}

function bar(tag, label, value, before) {
  const fill = make("span", { className: "bar" }, make("span", {}), make("span", {}));
  fill.children[0].style.width = `${100 * value}%`;
  fill.children[1].style.left = `${100 * before}%`;
  return make(tag, { className: "row" }, make("span", {}, label), fill, make("span", {}, value.toFixed(3)));
}

function drawCurve(value, loss, predicted) {
  const { curve, before, gradient, then, reach } = held, losses = curve.map(([, y]) => y);
  const low = Math.min(...losses), room = 0.1 * Math.max(Math.max(...losses) - low, reach * Math.abs(gradient), 1e-9);
  const [left, right, high] = [before - reach, before + reach, Math.max(...losses) + room];
  const x = (w) => 50 + (380 * (w - left)) / (right - left), y = (l) => 230 - (220 * (l - low + room)) / (high - low + room);
  const tangent = (w) => `${x(w)} ${y(then.loss + gradient * (w - before))}`;
  const label = (w, anchor) => `<text x="${x(w)}" y="250" text-anchor="${anchor}">${num(w, 3)}</text>`;
  $("curve").innerHTML = `<clipPath id="inside"><rect x="50" y="5" width="380" height="226"/></clipPath>
    <path class="axis" d="M50 5V231H430"/>${label(left, "start")}${label(before, "middle")}${label(right, "end")}
    <text x="46" y="${y(low)}" text-anchor="end">${num(low, 3)}</text><text x="46" y="15" text-anchor="end">${num(high, 3)}</text>
    <g clip-path="url(#inside)"><path class="loss" d="M${curve.map(([w, l]) => `${x(w)} ${y(l)}`).join("L")}"/>
    <path class="tangent" d="M${tangent(left)}L${tangent(right)}"/><path class="miss" d="M${x(value)} ${y(loss)}V${y(predicted)}"/>
    <circle class="was" cx="${x(before)}" cy="${y(then.loss)}" r="4"/><circle class="is" cx="${x(value)}" cy="${y(loss)}" r="6"/></g>`;
}

// --------------------------------------------------------------------------------------------------------------------
// What the reader does

const isCell = (element) => element.dataset.index !== undefined;

for (const type of ["pointerover", "focusin", "click"]) {
  $("maps").addEventListener(type, ({ target }) => {
    if (!isCell(target) || (pinned && type === "pointerover")) return;
    if (type === "click") pinned = pinned === target ? null : target;
    choose(target.dataset.role, indexOf(target));
  });
}
for (const type of ["click", "keydown"]) {
  $("weights").addEventListener(type, (event) => {
    if (isCell(event.target) && (type === "click" || event.key === "Enter")) grab(held.name, indexOf(event.target));
  });
}
for (const id of ["maps", "weights"]) $(id).addEventListener("keydown", moveInTable);
$("parameter").onchange = ({ target }) => grab(target.value, TENSORS[target.value].shape.map(() => 0));
$("move").oninput = ({ target }) => move(Number(target.value));
$("back").onclick = () => move(Number(($("move").value = held.before)));
$("previous").onclick = () => go(current - 1);
$("next").onclick = () => go(current + 1);
$("play").onclick = () => play(timer === null);
document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.target.closest("td, input, select") || (event.key === " " && event.target.closest("button, a"))) return;
  const to = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: SEQUENCE.length - 1 }[event.key];
  if (to === undefined && event.key !== " ") return;
  event.preventDefault();
  if (to === undefined) play(timer === null);
  else go(to);
});

$("text").textContent = text(DATA.idx);
$("truth").textContent = text(DATA.targets);
$("parameter").append(...PARAMETERS.map((name) => make("option", {}, name)));
drawColumn();
go(0);
grab("wte.weight", [DATA.idx.at(-1), 0]);
