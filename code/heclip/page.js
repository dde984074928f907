// What the reader does on the page of a prediction. Bokeh draws the maps (see page.py).
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const lines = document.getElementById("values").textContent.trim().split("\n");
const byId = (id) => document.getElementById(id);
const state = {gene: -1, values: {}, spot: -1, sort: null, down: true, shown: []};
const ROWS = 300; // of the gene table at a time, so that phones stay quick
let model, start; // model(name): a Bokeh model. start: the ranges at first

// ------------------------------------------------------------------------------------ values

async function decode(gene) {
  const bytes = Uint8Array.from(atob(lines[gene]), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const steps = new Uint8Array(await new Response(stream).arrayBuffer());
  const values = {}, n = data.spots.length;
  Object.entries(data.ranges).forEach(([layer, ranges], place) => {
    const [low, high] = ranges[gene];
    const part = steps.subarray(place * n, (place + 1) * n);
    values[layer] = Float32Array.from(part, (step) => low + step / (data.steps - 1) * (high - low));
  });
  if (values.measured)
    values.difference = values.predicted.map((value, spot) => value - values.measured[spot]);
  return values;
}

function robust(values) { // the 1st and 99th percentile, or the ends if those are equal
  const sorted = Float32Array.from(values).sort(), last = sorted.length - 1;
  let low = sorted[Math.round(last * 0.01)], high = sorted[Math.round(last * 0.99)];
  if (low === high) [low, high] = [sorted[0], sorted[last]];
  return high > low ? [low, high] : [low, low + 1];
}

const text = (value) => value.toFixed(2).replace("-", "−");

// ------------------------------------------------------------------------------------ one gene

async function show(gene) {
  state.gene = gene;
  const values = await decode(gene);
  if (gene !== state.gene) return; // another one was chosen meanwhile
  state.values = values;
  const source = model("gene");
  Object.assign(source.data, values);
  colour();
  source.change.emit();
  byId("symbol").textContent = data.genes.symbols[gene];
  const facts = data.genes.numbers.filter((column) => column.values[gene] !== null)
    .map((column) => `${column.label} ${text(column.values[gene])}`);
  byId("about").textContent = [data.genes.ids[gene], data.genes.markers[gene] && "marker", ...facts]
    .filter(Boolean).join(" · ");
  for (const row of byId("rows").rows)
    row.setAttribute("aria-current", Number(row.dataset.gene) === gene);
  tell();
}

function colour() {
  const shared = byId("scale")?.value === "shared" && robust(state.values.measured);
  for (const [name, values] of Object.entries(state.values)) {
    let [low, high] = (name !== "difference" && shared) || robust(values);
    if (name === "difference") {
      high = Math.max(Math.abs(low), Math.abs(high));
      low = -high;
    }
    model(`${name} colours`).setv({low, high});
    bar(name, values);
  }
}

function bar(name, values) {
  const {low, high, palette} = model(`${name} colours`);
  const below = values.some((value) => value < low - 1e-6);
  const above = values.some((value) => value > high + 1e-6);
  const box = document.querySelector(`[data-bar="${name}"]`), strip = document.createElement("i");
  strip.style.background = `linear-gradient(to right, ${palette.map(css).join()})`;
  box.replaceChildren((below ? "≤ " : "") + text(low), strip, (above ? "≥ " : "") + text(high));
}

const css = (number) => typeof number === "string" ? number
  : `#${(number >>> 8).toString(16).padStart(6, "0")}`;

// ------------------------------------------------------------------------------------ gene table

function heads() {
  const columns = [{label: "gene", title: "sort by symbol"}, ...data.genes.numbers];
  byId("heads").replaceChildren(...columns.map((column, place) => {
    const cell = document.createElement("th"), button = document.createElement("button");
    cell.scope = "col";
    button.type = "button";
    button.textContent = column.label;
    button.title = column.title;
    button.onclick = () => sortBy(place - 1);
    cell.append(button);
    return cell;
  }));
}

function sortBy(column) { // -1: the symbols
  state.down = state.sort === column ? !state.down : column >= 0;
  state.sort = column;
  [...byId("heads").cells].forEach((cell, place) => {
    const mine = place - 1 === column, direction = state.down ? "descending" : "ascending";
    cell.setAttribute("aria-sort", mine ? direction : "none");
    cell.firstChild.textContent = cell.firstChild.textContent.replace(/ [▲▼]$/, "")
      + (mine ? (state.down ? " ▼" : " ▲") : "");
  });
  list();
}

function list() {
  const wanted = byId("search").value.trim().toLowerCase();
  const {ids, symbols, numbers} = data.genes;
  const found = [...ids.keys()].filter((gene) => symbols[gene].toLowerCase().includes(wanted)
    || ids[gene].toLowerCase().includes(wanted));
  const key = state.sort < 0 ? null : numbers[state.sort].values;
  const sign = state.down ? -1 : 1;
  found.sort((a, b) => {
    if (!key) return sign * symbols[a].localeCompare(symbols[b], "en", {numeric: true});
    if (key[a] === null || key[b] === null) return (key[a] === null) - (key[b] === null);
    return sign * (key[a] - key[b]);
  });
  // An exact symbol comes first, so that Enter chooses it.
  const exact = found.findIndex((gene) => symbols[gene].toLowerCase() === wanted);
  if (exact > 0) found.unshift(...found.splice(exact, 1));
  state.shown = found;
  byId("rows").replaceChildren(...found.slice(0, ROWS).map(row));
  byId("found").textContent = found.length > ROWS
    ? `${found.length.toLocaleString("en")} genes, the first ${ROWS} are listed`
    : found.length ? `${found.length} gene${found.length > 1 ? "s" : ""}`
      : "No gene of this page has that name.";
}

function row(gene) {
  const line = document.createElement("tr"), button = document.createElement("button");
  line.dataset.gene = gene;
  line.setAttribute("aria-current", gene === state.gene);
  button.type = "button";
  button.textContent = data.genes.symbols[gene] + (data.genes.markers[gene] ? " ★" : "");
  button.title = data.genes.ids[gene] + (data.genes.markers[gene] ? ", a marker" : "");
  line.insertCell().append(button);
  for (const column of data.genes.numbers)
    line.insertCell().textContent = column.values[gene] === null ? "–" : text(column.values[gene]);
  line.onclick = () => show(gene);
  return line;
}

function step(by) { // to the next or previous gene of the list
  const place = state.shown.indexOf(state.gene) + by;
  const gene = state.shown[Math.max(0, Math.min(state.shown.length - 1, place))];
  if (gene === undefined) return;
  show(gene);
  document.querySelector(`#rows tr[data-gene="${gene}"]`)?.scrollIntoView({block: "nearest"});
}

// ------------------------------------------------------------------------------------ move, spots

function view(change) { // change: [start, end] -> [start, end]
  for (const [axis, grow] of [["x", 1], ["y", 1]]) {
    const range = model(axis), [first, last] = change([range.start, range.end], axis, grow);
    range.setv({start: first, end: last});
  }
}

const zoom = (factor) => view(([first, last]) => {
  const middle = (first + last) / 2, half = (last - first) / 2 / factor;
  return [middle - half, middle + half];
});
const move = (dx, dy) => view(([first, last], axis) => {
  const by = (axis === "x" ? dx : dy) * Math.abs(last - first);
  return [first + by, last + by];
});
const whole = () => view((_, axis) => start[axis]);

function choose(spot) {
  state.spot = spot;
  ring();
  tell();
}

// The chosen spot's ring is not Bokeh's, which would draw every spot of every map again for it.
function ring() {
  const [x, y] = [model("x"), model("y")], {data: at} = model("fixed"), {spot} = state;
  const across = x.end - x.start, radius = start.radius * Number(byId("size").value);
  for (const mark of document.querySelectorAll(".ring")) {
    mark.hidden = spot < 0;
    if (mark.hidden) continue;
    mark.style.left = `${(at.x[spot] - x.start) / across * 100}%`;
    mark.style.top = `${(at.y[spot] - y.end) / (y.start - y.end) * 100}%`;
    mark.style.width = `${radius * 2.6 / across * 100}%`;
  }
}

function facts(spot) {
  const rows = Object.entries(state.values).map(([name, values]) => [name, values[spot]]);
  for (const name of ["spread", "similarity"])
    if (data.maps.includes(name)) rows.push([name, model("fixed").data[name][spot]]);
  const error = data.genes.numbers.find((column) => column.name === "error");
  return rows.map(([name, value]) => `${name} ${text(value)}`
    + (name === "predicted" && error ? ` ± ${text(error.values[state.gene])}` : ""));
}

function tell() {
  if (state.spot < 0) return;
  byId("spot").textContent = `Spot ${data.spots[state.spot]} · `
    + `${data.genes.symbols[state.gene]}: ${facts(state.spot).join(" · ")}`;
}

function spotAt(event) { // the spot under the pointer, or -1
  const box = event.currentTarget.getBoundingClientRect();
  const at = (axis, share) => {
    const {start: first, end: last} = model(axis);
    return first + share * (last - first);
  };
  const px = at("x", (event.clientX - box.left) / box.width);
  const range = model("y"); // it runs from the bottom to the top
  const py = range.end + (event.clientY - box.top) / box.height * (range.start - range.end);
  const {x, y} = model("fixed").data;
  let best = -1, nearest = (data.diameter * Math.max(1, Number(byId("size").value))) ** 2;
  for (let spot = 0; spot < x.length; spot++) {
    const distance = (x[spot] - px) ** 2 + (y[spot] - py) ** 2;
    if (distance < nearest) [best, nearest] = [spot, distance];
  }
  return best;
}

function point(event) {
  if (event.buttons) return; // the map is dragged
  const spot = spotAt(event), tip = byId("tip");
  if (spot !== state.spot && (spot >= 0 || event.type === "click")) choose(spot);
  tip.hidden = spot < 0 || event.pointerType !== "mouse";
  if (tip.hidden) return;
  tip.textContent = [`Spot ${data.spots[spot]}`, ...facts(spot)].join("\n");
  tip.style.left = `${Math.min(event.clientX + 14, innerWidth - 210)}px`;
  tip.style.top = `${Math.min(event.clientY + 14, innerHeight - 130)}px`;
}

const nextSpot = (by) => choose((state.spot + by + data.spots.length) % data.spots.length);

function restyle() {
  for (const name of data.maps) {
    const spots = model(`${name} spots`), alpha = Number(byId("opacity").value);
    spots.glyph.setv({radius: {value: start.radius * Number(byId("size").value)},
      fill_alpha: {value: alpha}, line_alpha: {value: alpha}});
  }
  ring();
}

// ------------------------------------------------------------------------------------ begin

const KEYS = {
  ArrowLeft: () => move(-0.1, 0), ArrowRight: () => move(0.1, 0), ArrowUp: () => move(0, 0.1),
  ArrowDown: () => move(0, -0.1), "+": () => zoom(1.5), "=": () => zoom(1.5),
  "-": () => zoom(1 / 1.5), 0: whole, n: () => nextSpot(1), p: () => nextSpot(-1),
};

function listen() {
  byId("search").oninput = list;
  byId("search").onkeydown = (event) => {
    const keys = {ArrowDown: () => step(1), ArrowUp: () => step(-1),
      Enter: () => state.shown.length && show(state.shown[0])};
    if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
  };
  byId("maps").onkeydown = (event) => {
    if (!KEYS[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    KEYS[event.key]();
  };
  const clicks = {in: () => zoom(1.5), out: () => zoom(1 / 1.5), whole,
    next: () => nextSpot(1), previous: () => nextSpot(-1)};
  for (const [id, action] of Object.entries(clicks)) byId(id).onclick = action;
  if (byId("scale")) byId("scale").onchange = colour;
  byId("opacity").oninput = byId("size").oninput = restyle;
  for (const map of document.querySelectorAll(".map")) {
    scrollable(map);
    map.addEventListener("pointermove", point);
    map.addEventListener("click", point);
    map.addEventListener("pointerleave", () => { byId("tip").hidden = true; });
  }
}

function scrollable(map) { // a finger that moves up or down scrolls the page, not the map
  const canvas = map.querySelector(".bk-Plot").shadowRoot.querySelector(".bk-Canvas");
  canvas.shadowRoot.querySelector(".bk-events").style.touchAction = "pan-y";
}

async function begin() {
  const frame = () => new Promise((done) => setTimeout(done, 20));
  while (!Bokeh.documents[0]?.get_model_by_name("gene")) await frame();
  const models = new Map();
  model = (name) => {
    if (!models.has(name)) models.set(name, Bokeh.documents[0].get_model_by_name(name));
    return models.get(name);
  };
  start = {radius: model("slide spots").glyph.radius.value};
  for (const axis of ["x", "y"]) start[axis] = [model(axis).start, model(axis).end];
  for (const name of ["spread", "similarity"])
    if (data.maps.includes(name)) bar(name, Float32Array.from(model("fixed").data[name]));
  for (const axis of ["x", "y"]) model(axis).change.connect(ring);
  heads();
  sortBy(data.genes.numbers.length ? 0 : -1);
  listen();
  await show(state.shown[0]);
  document.body.dataset.ready = "yes";
}

function failed(error) {
  byId("failed").hidden = false;
  byId("failed").textContent = typeof DecompressionStream === "undefined"
    ? "This browser is too old for the maps. Open the page in one from 2023 or later."
    : `The maps cannot be shown: ${error.message}`;
  throw error;
}

begin().catch(failed);
