// Draws the data of look.py: one training step. `state` is the view, the step and the token; `go` changes it.
const byId = (id) => document.getElementById(id), look = JSON.parse(byId("look").textContent);
const T = look.ids.length - 1, dark = matchMedia("(prefers-color-scheme: dark)");
const state = { view: "Steps", step: 0, token: look.token, layer: 0, head: 0, weight: 0 };

const go = (change) => render(Object.assign(state, change));

// --- elements, names and numbers ---------------------------------------------------------------------------

function el(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element[name] = value;
    else if (value !== null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null));
  return element;
}

// A menu of names. state[key] is the number of the chosen name.
function choose(label, key, names) {
  const onchange = (event) => go({ [key]: event.target.selectedIndex });
  return el("select", { "aria-label": label, id: key, onchange },
    names.map((name, n) => el("option", { selected: n === state[key] ? "" : null }, name)));
}

function table(head, rows, chosen = -1) {
  const row = (cells, tag) => cells.map((cell) => el(tag, {}, typeof cell === "number" ? short(cell) : cell));
  return el("div", { class: "wide" }, el("table", {}, el("thead", {}, el("tr", {}, row(head, "th"))),
    rows.map((cells, n) => el("tr", { class: n === chosen ? "chosen" : null }, row(cells, "td")))));
}

const unpack = (text) => new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
const short = (x) => String(Number(x.toPrecision(4)));
const percent = (x) => (100 * x).toFixed(1) + " %";
const word = (id) => look.words[id] ?? `id ${id}`;
const quoted = (id) => `“${word(id)}”`;
const token = (t) => `token ${t + 1} ${quoted(look.ids[t])}`;
const inLayer = (step) => step.layer === null ? "" : `layer ${step.layer}`;
const stepName = (step, n) => [n + 1 + ": " + step.phase, inLayer(step), step.op].filter(Boolean).join(", ");

// The name of row or column i of n.
function place(kind, i, n) {
  if (kind === "token") return i < n - T ? `prompt row ${i + 1}` : token(i - n + T);
  return kind === "word" ? `${quoted(i)} (id ${i})` : `${kind} ${i}`.trim();
}

// The row of the chosen token among n rows.
function chosenRow(kind, n) {
  const t = state.token;
  return { token: n - T + t, word: look.ids[t], position: look.prefix + t }[kind] ?? 0;
}

// --- a picture of an array ---------------------------------------------------------------------------------

function colour(strength, negative, frozen) {
  const [red, paper] = dark.matches ? [[245, 90, 50], 18] : [[205, 50, 20], 255];
  const full = frozen ? [128, 128, 128] : negative ? [40, 110, 235] : red;
  return [...full.map((c) => Math.round(paper + strength * (c - paper))), 255];
}

function picture(array, title, { frozen = false, rowNames = null } = {}) {
  const { rows, columns, kinds, size: [R, C] } = array, values = array.values ?? unpack(array.data);
  const most = Math.max(Math.abs(array.min), Math.abs(array.max)) || 1;
  const canvas = el("canvas", { width: columns.length, height: rows.length, tabindex: 0, role: "img" });
  const pixels = new ImageData(columns.length, rows.length), readout = el("output", {});
  values.forEach((x, i) => pixels.data.set(colour(Math.sqrt(Math.abs(x) / most), x < 0, frozen), 4 * i));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  const ofTokens = kinds[0] === "token", chosen = ofTokens ? chosenRow("token", R) : -1;
  const names = rowNames ?? (ofTokens ? rows.map((r) => place("token", r, R).replace("token ", "")) : []);
  canvas.style.height = rows.length * (names.length ? 14 : rows.length === 1 ? 20 : 6) + "px";
  canvas.style.maxWidth = columns.length * 28 + "px";
  const text = `(${array.shape.join(", ")}) ${short(array.min)} to ${short(array.max)}`;
  canvas.setAttribute("aria-label", `${title} ${text}. Shift and arrow keys read its numbers.`);
  let at = [0, 0];
  const read = (row, column) => {
    at = [Math.max(0, Math.min(rows.length - 1, row)), Math.max(0, Math.min(columns.length - 1, column))];
    const where = rowNames?.[at[0]] ?? (kinds[0] ? place(kinds[0], rows[at[0]], R) : title);
    const value = short(values[at[0] * columns.length + at[1]]);
    readout.value = `${where}, ${place(kinds[1], columns[at[1]], C)}: ${value}`;
  };
  canvas.onpointermove = canvas.onpointerdown = (event) => {
    const down = event.offsetY / canvas.clientHeight, right = event.offsetX / canvas.clientWidth;
    read(Math.floor(down * rows.length), Math.floor(right * columns.length));
  };
  canvas.onkeydown = (event) => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (move && event.shiftKey) read(at[0] + move[0], at[1] + move[1]);
  };
  const thinned = [[rows, R, "rows"], [columns, C, "columns"]].filter(([shown, n]) => shown.length < n)
    .map(([shown, n, what]) => `; thinned: ${shown.length} of ${n} ${what}`);
  const labels = names.map((name, i) => el("span", { class: i === chosen ? "chosen" : null }, name));
  return el("figure", {}, el("figcaption", {}, el("b", {}, title), " ", el("span", {}, text), thinned),
    el("div", { class: "picture" }, el("div", { class: names.length ? "names" : "" }, labels), canvas),
    readout, rowNames ? null : numbers(array, values));
}

// The numbers of one row: the chosen token's row, or the first row.
function numbers({ rows, columns, kinds, whole, size: [R, C] }, values) {
  const row = chosenRow(kinds[0], R), start = rows.indexOf(row) * columns.length;
  if (start < 0 && !whole[row]) return null;
  const shown = whole[row] ? unpack(whole[row]) : values.slice(start, start + columns.length);
  const text = el("p", { class: "numbers" }), count = `${shown.length} of ${C} numbers`;
  const fill = () => {
    const name = (i) => place(kinds[1], whole[row] ? i : columns[i], C).replace(/^channel |^column /, "");
    text.textContent = [...shown].map((x, i) => `${name(i)}: ${Number(x.toPrecision(7))}`).join("\n");
  };
  const summary = kinds[0] ? `${place(kinds[0], row, R)}: ${count}` : count;
  return el("details", { ontoggle: fill }, el("summary", { class: "numbers" }, summary), text);
}

// --- the view Steps ----------------------------------------------------------------------------------------

const isPart = ([source]) => !["loss", "forward", "backward"].includes(look.sources[source].name);

// The statement of the model's part that calls the operation, such as qkv, c2 = self.linear(a, ...).
function lineOf(step) {
  const [source, line] = step.frames.findLast(isPart) ?? step.frames[0];
  const { text, first } = look.sources[source];
  let statement = "";
  for (const content of text.split("\n").slice(line - first)) {
    statement += content.trim().replace(/  #.*/, "").replace(/,$/, ", ");
    if (statement.split("(").length <= statement.split(")").length) break;  // no open bracket
  }
  return statement.replace(", )", ")");
}

function code(source, line, open) {
  const { file, name, first, text } = look.sources[source];
  const lines = text.split("\n").map((content, i) =>
    first + i === line ? el("mark", { "aria-current": "true" }, content + "\n") : content + "\n");
  return el("details", open ? { open: "" } : {}, el("summary", {}, `${file}, ${name}, line ${line ?? first}`),
    el("pre", {}, lines));
}

function steps() {
  const step = look.steps[state.step], last = look.steps.length - 1;
  const settings = Object.entries(step.numbers).map(([key, value]) => `${key} = ${short(value)}`).join(", ");
  const to = (id, n) => ({ id, onclick: () => go({ step: Math.min(last, Math.max(0, n)) }) });
  return [
    el("div", { class: "bar" }, el("button", to("back", state.step - 1), "← back"),
      choose("Step", "step", look.steps.map(stepName)), el("button", to("next", state.step + 1), "next →")),
    el("h2", {}, lineOf(step)),
    el("div", { class: "columns" },
      el("section", { "aria-label": "Code" },
        step.frames.toReversed().map((at) => code(...at, isPart(at))), code(step.source, null, true)),
      el("section", { "aria-label": "Arrays" }, el("p", {}, settings), beside(step), step.arrays.map(pair)))];
}

function pair({ name, param, frozen, a, g }) {
  const title = name + (param ? ` = ${param}` : "") + (frozen ? ", frozen" : "");
  return el("div", { class: "pair" }, a === null ? null : picture(look.arrays[a], title, { frozen }),
    g === null ? null : picture(look.arrays[g], `gradient of ${name}`));
}

// The part of a step that is not its arrays.
function beside(step) {
  if (step.op === "attention_forward") return attention(step.layer);
  if (step.phase === "loss") {
    const rows = look.ids.slice(1).map((id, t) => [token(t), quoted(id), percent(Math.exp(-look.nll[t])),
      look.nll[t], look.weights[t] || "0 (masked)"]);
    return el("div", {}, el("p", {}, `Loss: ${short(look.loss)} nats, the sum of cost × weight.`),
      table(["after", "expected", "probability p", "cost, -log p", "weight"], rows, state.token));
  }
  if (step.op !== "adamw") return null;
  state.weight %= step.weights.length;
  const { row, arrays } = look.update[step.weights[state.weight]];
  const titles = ["w before", "gradient g", "m, mean of g", "v, mean of g²", "w after", "change of w"];
  return el("div", {}, el("p", {}, `Loss: ${short(look.loss)}; after all updates: ${short(look.after)}. `,
    "This is the optimizer's first update: m and v were 0."),
    choose("Weight", "weight", step.weights), row === null ? "" : ` row ${row}`,
    arrays.map((n, i) => picture(look.arrays[n], titles[i])));
}

// --- the other views ---------------------------------------------------------------------------------------

// For each head of a layer: its probabilities (rows look at columns), and the chosen token's best column.
function heads({ shape: [H, R, C], data }) {
  const all = unpack(data), at = chosenRow("token", R) * C;
  return Array.from({ length: H }, (_, h) => {
    const values = all.slice(h * R * C, (h + 1) * R * C), own = values.slice(at, at + C);
    const p = Math.max(...own);
    return { values, shape: [R, C], p, best: place("token", own.indexOf(p), C) };
  });
}

function map(values, shape, kinds, title, options) {
  const [rows, columns] = shape.map((n) => [...Array(n).keys()]);
  const range = { min: Math.min(...values), max: Math.max(...values) };
  return picture({ values, shape, size: shape, kinds, rows, columns, whole: {}, ...range }, title, options);
}

function attention(layer) {
  const all = heads(look.attention[layer]), { values, shape, p, best } = all[state.head];
  return el("div", {}, choose("Head", "head", all.map((_, h) => `head ${h}`)), ` of layer ${layer}: `,
    `${token(state.token)} attends most to ${best}, ${percent(p)}.`,
    map(values, shape, ["token", "token"], "attention: a row looks at the columns"));
}

function attentions() {
  const names = look.attention.map((_, layer) => `layer ${layer}`), all = look.attention.map(heads);
  const rows = all.map((layer, n) => [names[n], ...layer.map(({ best, p }) => `${best} ${percent(p)}`)]);
  return [el("h2", {}, `Where ${token(state.token)} looks`),
    el("p", {}, "The token that gets most of each head's attention. A token sees itself and earlier tokens."),
    table(["", ...all[0].map((_, h) => `head ${h}`)], rows, state.layer),
    choose("Layer", "layer", names), attention(state.layer)];
}

function predictions() {
  const t = state.token, next = quoted(look.ids[t + 1]), layers = look.lens.map((layer) => layer[t]);
  const names = layers.map((_, n) => n ? `after layer ${n - 1}` : "embedding");
  const [last, p] = layers.at(-1)[0][0];
  const rows = layers.map(([likeliest, expected], n) => [names[n], percent(expected),
    ...likeliest.map(([id, p]) => `${quoted(id)} ${percent(p)}`)]);
  const decided = layers.findLastIndex(([likeliest]) => likeliest[0][0] !== last) + 1;
  return [el("h2", {}, `What comes after ${token(t)}?`),
    el("p", {}, `The model predicts ${quoted(last)}, ${percent(p)}. The text has ${next}.`),
    el("p", {}, `From “${names[decided]}” to the end, ${quoted(last)} is the likeliest.`),
    table(["stream", `expected ${next}`, "likeliest", "2nd", "3rd", "4th", "5th"], rows, decided),
    el("p", {}, "Each row: the output layer reads the stream there (logit lens). The last row is final.")];
}

function gradients() {
  const t = state.token, passed = look.steps.map((step, n) => ({ ...step, n })).filter(({ norms }) => norms);
  const ends = passed.filter(({ layer }, i) => layer !== passed[i + 1]?.layer).reverse();
  const name = (layer) => layer === 0 ? "embedding" : `after layer ${(layer ?? look.layers) - 1}`;
  const names = ends.map(({ layer }) => name(layer));
  const lowest = look.steps.find(({ op }) => op === "embedding_backward")?.arrays[0].g;
  const rows = passed.map((step) => [
    el("button", { onclick: () => go({ view: "Steps", step: step.n }) }, `step ${step.n + 1}`),
    inLayer(step), step.op, lineOf(step), step.norms[t]]);
  return [el("h2", {}, `The gradient at ${token(t)}`),
    map(ends.flatMap(({ norms }) => norms), [ends.length, T], ["", "token"], "length", { rowNames: names }),
    el("p", {}, `At “${names[0]}” its length (norm) is ${short(ends[0].norms[t])}. A row of wte.weight, `,
      "if trained, gets the sum over all places of its token, plus the part of the output layer."),
    lowest === undefined ? null : picture(look.arrays[lowest], "gradient of the embeddings"),
    el("h3", {}, `The ${rows.length} operations back from the loss, and the gradient's length after each`),
    table(["", "", "operation", "line", "length"], rows)];
}

function checks() {
  const rows = look.check.map(({ name, at, backward, slope }) => [`${name}[${at}]`, backward, slope,
    Math.abs(backward - slope) / Math.max(Math.abs(backward), Math.abs(slope), 1e-30)]);
  return [el("h2", {}, `Is the gradient right? A measurement of ${rows.length} weights`),
    el("p", {}, "Slope: (loss(w + h) - loss(w - h)) / 2h, h = 0.00001, in float64. Backward: in float32."),
    table(["weight", "gradient, by backward", "slope, by two losses", "relative difference"], rows)];
}

// --- the page ----------------------------------------------------------------------------------------------

const VIEWS = { Steps: steps, Attention: attentions, Predictions: predictions, Gradient: gradients,
  Check: checks };

function render() {
  const focused = document.activeElement?.id, { view, step, token: chosen } = state;
  byId("views").replaceChildren(...Object.keys(VIEWS).map((name) => el("button",
    { id: name, "aria-current": name === view ? "page" : null, onclick: () => go({ view: name }) }, name)));
  byId("tokens").replaceChildren(...look.ids.map((id, t) => {
    const masked = t > 0 && look.weights[t - 1] === 0, about = masked ? ", masked: not learned" : "";
    const own = { id: `token-${t}`, class: masked ? "token masked" : "token", title: token(t) + about };
    if (t === T) return el("span", { ...own, title: "predicted, not read" + about }, word(id));
    return el("button", { ...own, "aria-pressed": t === chosen, onclick: () => go({ token: t }) }, word(id));
  }));
  byId("view").replaceChildren(...VIEWS[view]().filter((part) => part !== null));
  byId("status").textContent = view === "Steps" ? "Step " + stepName(look.steps[step], step) : token(chosen);
  byId(focused)?.focus();
}

byId("about").textContent = `The model: ${look.about}. Dropout is off. Loss ${short(look.loss)}; after one ` +
  `update with the learning rate ${look.lr}: ${short(look.after)}.`;
document.addEventListener("keydown", (event) => {
  const { shiftKey, ctrlKey, altKey, metaKey, target } = event;
  if (shiftKey || ctrlKey || altKey || metaKey || target.tagName === "SELECT") return;
  const [key, last] = state.view === "Steps" ? ["step", look.steps.length - 1] : ["token", T - 1];
  const to = { ArrowLeft: state[key] - 1, ArrowRight: state[key] + 1, Home: 0, End: last }[event.key];
  if (!(to >= 0 && to <= last)) return;
  event.preventDefault();
  go({ [key]: to });
});
dark.addEventListener("change", render);
render();
