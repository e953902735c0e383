
// The table of all samples. Its data lie packed in #data, as table.py writes them; texts reach the
// page as text alone, never as HTML.

const ROW = 34; // height of a row in pixels, as in table.css
const TALLEST = 8e6; // pixels of the scrolled area; browsers can't lay out much more
const HOTTEST = 6; // token losses from there on have the full colour
const DECADES = 1.5; // of temperatures on either side of the first one

const get = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

async function unpack(base64) {
  const stream = new Blob([bytesOf(base64)]).stream();
  const content = stream.pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(content).text());
}

function numberText(value, isSigned = false) {
  if (Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  let text = String(Number(size.toPrecision(3)));
  if (Number.isInteger(value) || size >= 1000) text = Math.round(size).toLocaleString("en");
  else if (size < 1e-3) text = size.toExponential(1);
  return (value < 0 ? "−" : isSigned && value > 0 ? "+" : "") + text;
}

const data = await unpack(get("data").textContent);
const count = data.count;
const columns = data.columns.map((column) => ({
  ...column,
  values: new Float32Array(bytesOf(column.values).buffer),
}));
const losses = columns[0].values;
const weight = { name: "weight", values: new Float32Array(count) };
const indices = { name: "#", values: Float64Array.from({ length: count }, (_, i) => i) };
if (data.temperatures) columns.splice(1, 0, weight);
columns.unshift(indices);
const marks = data.marks && {
  names: data.marks.names,
  bits: bytesOf(data.marks.bits),
  first: new Int32Array(bytesOf(data.marks.first).buffer),
};
const heats = tokenLosses(data.tokens);

const state = { order: new Uint32Array(0), column: null, isRising: false, picked: -1, origin: 0 };

// The texts

const piecesOf = (index) => (data.texts && data.texts.rows[index]) || [];

function textOf(index) {
  return piecesOf(index).filter((_, place) => place % 2).join("\n");
}

let searched = null; // every text in small letters, made for the first search

function searchedTexts() {
  searched ??= Array.from({ length: count }, (_, index) => textOf(index).toLowerCase());
  return searched;
}

function markNames(index) {
  return marks ? marks.names.filter((_, place) => (marks.bits[index] >> place) & 1) : [];
}

// Which samples are shown, and in which order

function filterOf(query, mark) {
  const words = query.trim().toLowerCase();
  const number = /^#\d+$/.test(words) ? Number(words.slice(1)) : -1;
  const texts = words && number < 0 ? searchedTexts() : null;
  return (index) =>
    (mark < 0 || (marks.bits[index] >> mark) & 1) &&
    (number < 0 || index === number) &&
    (!texts || texts[index].includes(words));
}

function sort() {
  const { values } = state.column;
  const sign = state.isRising ? 1 : -1;
  state.order.sort((a, b) => {
    const [left, right] = [values[a], values[b]];
    if (left === right) return a - b;
    if (Number.isNaN(left) || Number.isNaN(right)) {
      return Number.isNaN(left) - Number.isNaN(right) || a - b; // what has no value comes last
    }
    return left < right ? -sign : sign;
  });
}

function select() {
  const fits = filterOf(get("search").value, Number(get("marks").value));
  state.order = Uint32Array.from(indices.values).filter(fits);
  sort();
  get("number").textContent = `${state.order.length.toLocaleString("en")} of ` +
    `${count.toLocaleString("en")} sample${count === 1 ? "" : "s"}`;
  get("pad").style.height = `${Math.min(state.order.length * ROW, TALLEST)}px`;
  get("view").scrollTop = 0;
  draw();
}

function sortBy(column) {
  // A second click turns the order. The largest values are asked for first, but of numbers.
  state.isRising = state.column === column ? !state.isRising : column === indices;
  state.column = column;
  for (const [place, heading] of [...get("head").children].entries()) {
    if (columns[place] !== column) heading.removeAttribute("aria-sort");
    else heading.setAttribute("aria-sort", state.isRising ? "ascending" : "descending");
  }
  select();
}

// Rows: only those in view exist

function cellsOf(index) {
  const cells = columns.map((column) =>
    column === indices ? `#${index}` : numberText(column.values[index], column.isSigned));
  return cells.map((text) => make("span", { textContent: text, role: "cell" }));
}

function rowOf(index) {
  const row = make("div", { role: "row", onclick: () => pick(index) }, ...cellsOf(index));
  row.setAttribute("aria-selected", index === state.picked);
  const cell = (name, text) => make("span", { className: name, textContent: text, role: "cell" });
  if (data.images) row.append(make("span", { role: "cell" }, ...imageOf(index)));
  if (marks) row.append(cell("marks", markNames(index).join(", ")));
  if (data.texts) row.append(excerptOf(index));
  return row;
}

// The beginning of what a sample says: of its reply, too, however long the prompt is.
function excerptOf(index) {
  const pieces = piecesOf(index);
  const isTarget = (piece) => data.texts.speakers[pieces[2 * piece]][1];
  const says = (from, to) => pieces.slice(2 * from, 2 * to).filter((_, place) => place % 2)
    .join(" ").slice(0, 200).replace(/\s+/g, " ");
  const count = pieces.length / 2;
  let reply = 0;
  while (reply < count && !isTarget(reply)) reply++;
  if (reply === 0 || reply === count) {
    return make("span", { className: "words", role: "cell" }, says(0, count));
  }
  const parts = [make("i", {}, says(reply - 1, reply)), make("b", {}, `→ ${says(reply, count)}`)];
  return make("span", { className: "words exchange", role: "cell" }, ...parts);
}

function placesInView() {
  const view = get("view");
  const whole = Math.floor(view.clientHeight / ROW) - 1; // rows in full view, below the head
  const last = Math.max(0, state.order.length - whole);
  const range = view.scrollHeight - view.clientHeight;
  const first = range > 0 ? Math.round((view.scrollTop / range) * last) : 0;
  return [first, first + whole + 1];
}

function draw() {
  const inView = state.order.subarray(...placesInView());
  get("rows").replaceChildren(...Array.from(inView, rowOf));
}

function drawHead() {
  const headings = columns.map((column) =>
    make("button", { type: "button", textContent: column.name, onclick: () => sortBy(column) }));
  if (data.images) headings.push(make("span", { textContent: "image" }));
  if (marks) headings.push(make("span", { textContent: "marks" }));
  if (data.texts) headings.push(make("span", { textContent: "text" }));
  for (const heading of headings) heading.setAttribute("role", "columnheader");
  get("head").replaceChildren(...headings);
  const widths = columns.map((column) => Math.max(4.6, column.name.length * 0.6 + 2.2));
  if (data.images) widths.push(4.6);
  if (marks) widths.push(8);
  if (data.texts) widths.push(18); // the last column takes what is left of a wide window
  const last = `minmax(${widths.at(-1)}rem, 1fr)`;
  const others = widths.slice(0, -1).map((width) => `${width}rem`);
  get("view").style.setProperty("--columns", [...others, last].join(" "));
  get("view").style.setProperty("--least", `${widths.reduce((sum, width) => sum + width)}rem`);
}

// One sample

function pick(index) {
  state.picked = index;
  draw();
  drawSample();
}

function step(event) {
  const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const next = state.order[state.order.indexOf(state.picked) + by];
  if (!by || state.picked < 0 || next === undefined) return;
  event.preventDefault();
  get("view").scrollTop += by * ROW;
  pick(next);
}

function drawSample() {
  const index = state.picked;
  if (index < 0) return;
  const facts = make("div", { className: "facts" }, make("b", { textContent: `#${index}` }));
  for (const { name, values, isSigned } of columns.slice(1)) {
    facts.append(make("span", {}, `${name} `, make("b", {}, numberText(values[index], isSigned))));
  }
  if (marks) facts.append(...markNames(index).map((name) => make("span", {}, name)));
  if (marks && marks.first[index] < index) {
    const first = marks.first[index];
    const button = { type: "button", onclick: () => pick(first) };
    facts.append(make("button", button, `the first is #${first}`));
  }
  const texts = data.texts ? [chat(index)] : [];
  get("sample").replaceChildren(facts, ...imageOf(index), ...texts, ...heatMap(index));
}

function imageOf(index) {
  const src = data.images?.[index];
  return src ? [make("img", { src, alt: `sample ${index}`, className: "thumbnail" })] : [];
}

function chat(index) {
  const pieces = piecesOf(index);
  if (!pieces.length) return make("p", {}, "There was no room for this sample's text.");
  const block = make("pre");
  for (let place = 0; place < pieces.length; place += 2) {
    const [role, isTarget] = data.texts.speakers[pieces[place]];
    const piece = make("span", { className: isTarget ? "target" : "prompt" }, pieces[place + 1]);
    piece.dataset.role = role;
    block.append(role || isTarget ? piece : pieces[place + 1]);
  }
  return block;
}

function tokenLosses(tokens) {
  const found = new Map();
  if (!tokens) return found;
  const values = bytesOf(tokens.losses);
  let start = 0;
  for (const [place, index] of tokens.samples.entries()) {
    const end = start + tokens.lengths[place];
    found.set(index, { values: values.subarray(start, end), words: tokens.words?.[place] });
    start = end;
  }
  return found;
}

function heatMap(index) {
  const heat = heats.get(index);
  if (!heat) return [];
  const { steps, largest, none } = data.tokens;
  const unit = data.tokens.unit && ` ${data.tokens.unit}`;
  const map = make("div", { className: heat.words ? "heat" : "heat blank" });
  for (const [place, value] of heat.values.entries()) {
    const loss = value === none ? 0 : value / steps;
    const size = `${value === largest ? "≥ " : ""}${loss.toFixed(1)}${unit}`;
    const title = `target ${place + 1}: ${value === none ? "no loss" : size}`;
    const cell = make("i", { textContent: heat.words ? heat.words[place] : "", title });
    cell.style.setProperty("--heat", Math.min(1, loss / HOTTEST).toFixed(2));
    map.append(cell);
  }
  const heading = `Loss of each target (the full colour: ${HOTTEST}${unit} and more)`;
  return [make("p", {}, heading), map];
}

// Weights at a temperature

function temperatureNow() {
  const [first] = Object.values(data.temperatures)[0];
  return first * 10 ** ((get("temperature").valueAsNumber - 0.5) * 2 * DECADES);
}

function placeOf(temperature) {
  const [first] = Object.values(data.temperatures)[0];
  return 0.5 + Math.log10(temperature / first) / (2 * DECADES);
}

function weigh(temperature) {
  let [sum, squares, present] = [0, 0, 0];
  for (let i = 0; i < count; i++) {
    const value = Math.exp(-Math.max(0, losses[i] - state.origin) / temperature);
    weight.values[i] = value;
    if (Number.isNaN(value)) continue;
    sum += value;
    squares += value * value;
    present += 1;
  }
  showEffect(temperature, sum / present, squares > 0 ? (sum * sum) / squares : 0, present);
  draw(); // the order stays: weights fall where losses rise, at every temperature
  drawSample();
}

function shareText(share) { // as `percent` of page.py
  const percent = Math.round(100 * share);
  if (percent === 0 && share > 0) return "< 1 %";
  return percent === 100 && share < 1 - 1e-9 ? "> 99 %" : `${percent} %`;
}

function showEffect(temperature, mean, size, present) {
  const bold = (text) => make("b", {}, text);
  const effective = [
    ", effective sample size ", bold(Math.round(size).toLocaleString("en")), " of ",
    present.toLocaleString("en"), " (", bold(shareText(size / present)), ")",
  ];
  get("effect").replaceChildren(
    "temperature ", bold(numberText(temperature)), ", mean weight ", bold(numberText(mean)),
    ...(present < data.fewest ? [] : effective), // of few it says nothing of the data
    state.origin ? `; weights relative to the loss ${numberText(state.origin)}` : "",
  );
}

function chooseRule(button, [temperature, origin]) {
  for (const each of get("rules").children) each.setAttribute("aria-pressed", each === button);
  state.origin = origin;
  get("temperature").value = placeOf(temperature);
  weigh(temperature);
}

function startTemperature() {
  for (const [rule, pair] of Object.entries(data.temperatures)) {
    const button = make("button", { type: "button", textContent: rule });
    button.onclick = () => chooseRule(button, pair);
    get("rules").append(button, " ");
  }
  get("temperature").oninput = () => {
    for (const each of get("rules").children) each.setAttribute("aria-pressed", false);
    weigh(temperatureNow());
  };
  get("temperature").closest("div").hidden = false;
  get("rules").firstElementChild.click();
}

// Rows as a file

function csvCell(value) {
  let text = String(value);
  // A spreadsheet would run a text that begins like a formula.
  if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

const csvNumber = (value) => (Number.isNaN(value) ? "" : Number(value.toPrecision(8)));

function csv() {
  const names = columns.map((column) => (column === indices ? "index" : column.name));
  const lines = [[...names, ...(marks ? ["marks"] : []), ...(data.texts ? ["text"] : [])]];
  for (const index of state.order) {
    const row = columns.map(({ values }) => csvNumber(values[index]));
    if (marks) row.push(markNames(index).join(" "));
    if (data.texts) row.push(textOf(index));
    lines.push(row);
  }
  return lines.map((line) => line.map(csvCell).join(",")).join("\r\n") + "\r\n";
}

function save() {
  const place = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  make("a", { href: place, download: "samples.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(place), 10000);
}

// The start

function fillMarks() {
  const choice = (value, text) => make("option", { value, textContent: text });
  get("marks").append(choice(-1, "all samples"));
  get("marks").hidden = !marks;
  for (const [place, name] of (marks ? marks.names : []).entries()) {
    const number = marks.bits.reduce((sum, bits) => sum + ((bits >> place) & 1), 0);
    if (number) get("marks").append(choice(place, `${name} (${number.toLocaleString("en")})`));
  }
}

function showMarked(name) {
  get("search").value = "";
  get("marks").value = marks.names.indexOf(name);
  select();
  get("explorer").scrollIntoView();
}

function start() {
  fillMarks();
  drawHead();
  get("explorer").hidden = false;
  get("waiting").hidden = true;
  sortBy(columns.find((column) => column.values === losses));
  if (data.temperatures) startTemperature();
  let waiting = 0; // the search follows the last key
  get("search").oninput = () => {
    clearTimeout(waiting);
    waiting = setTimeout(select, 120);
  };
  get("marks").onchange = select;
  get("save").onclick = save;
  get("view").onscroll = draw;
  get("view").onkeydown = step;
  window.onresize = draw;
  for (const button of document.querySelectorAll("[data-mark]")) {
    button.hidden = false;
    button.onclick = () => showMarked(button.dataset.mark);
  }
}

start();
