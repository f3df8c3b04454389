"use strict";
// The page: puts the figures of costs.js into the sections, and again whenever the context or the skip set changes.

const byId = (id) => document.getElementById(id);
const planned = report.plan !== null;
const skipSets = planned ? { plan: new Set(report.sublayers.filter((row) => row.skipped).map((row) => row.path)) } : {};
for (const [name, paths] of Object.entries(report.skip_sets)) skipSets[name] = new Set(paths);
const names = Object.keys(skipSets);
const contexts = sliderStops();
const state = { context: report.context, set: names[0], chosen: 0, phase: phases[0], sort: "", grouped: true, filter: "" };

// What is looked at stands in the address, so that it can be sent to somebody.
const REMEMBERED = ["context", "set", "phase", "sort", "grouped", "filter"];
const first = { ...state };

function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const context = Number(asked.get("context"));
  if (contexts.includes(context)) state.context = context;
  if (names.includes(asked.get("set"))) state.set = asked.get("set");
  if (phases.includes(asked.get("phase"))) state.phase = asked.get("phase");
  state.sort = asked.get("sort") ?? state.sort;
  state.grouped = asked.get("grouped") !== "false";
  state.filter = asked.get("filter") ?? state.filter;
}

function writeAddress() {
  const told = new URLSearchParams(REMEMBERED.filter((name) => state[name] !== first[name]).map((name) => [name, state[name]]));
  const hash = told.size ? `#${told}` : "";
  if (hash !== location.hash) history.replaceState(null, "", hash || location.pathname);
}

function sliderStops() {
  const most = Math.max(report.longest ?? 131072, report.context);
  const stops = new Set([report.context]);
  for (let power = 6; 2 ** power <= most; power += 0.25) stops.add(Math.round(2 ** power));
  return [...stops].sort((a, b) => a - b);
}

const skipped = () => skipSets[state.set] ?? new Set();
// Examples are for what skipping so many is worth: which those would be nobody has found yet.
const drawnSkipped = () => (planned ? skipped() : new Set());
const bodySkipped = () => (planned && state.set === "plan" ? report.sublayers.filter((row) => row.body_left) : []);

// What a prompt of that length saves of each sublayer that the plan skips for its body.
function savedShares(phase, context) {
  if (phase !== "prefill" || context < report.plan?.prompt_from) return new Map();
  const saved = (row) => {
    const full = costAt(report.groups[row.group].cost, phase, context).flops;
    return full ? 1 - costAt(row.body_left, phase, context).flops / full : 0;
  };
  return new Map(bodySkipped().map((row) => [row.path, saved(row)]));
}

const predictShown = (phase, context) => predict(phase, context, skipped(), savedShares(phase, context));

function showHead() {
  document.title = `${report.model} · adaskip`;
  byId("model").textContent = report.model;
  byId("about").textContent =
    `${report.class}, ${count(report.parameters)} parameters, ${report.dtype}, ${report.sublayers.length} sublayers`;
  byId("footer").textContent = `Made by adaskip inspect, ${report.producer}. Everything on this page is in this file.`;
  byId("advice").append(...report.advice.map((line) => make("li", {}, line)));
  const timer = report.timer;
  byId("timed").textContent = timer.kind === "measured"
    ? `Times measured at ${timer.contexts.map(count).join(", ")} tokens on ${timer.machine}.${timer.doubts.length ? ` In doubt: ${timer.doubts.join("; ")}.` : ""}`
    : `Not calibrated: a roofline of ${operations(timer.flops)} operations and ${bytes(timer.bandwidth)} a second.`;
}

function tile(id, title, value, text, note) {
  return make("div", { class: "tile" }, make("h3", {}, title), make("data", { id, value }, text), make("p", {}, note));
}

function showTiles() {
  const tiles = phases.map((phase) => {
    const time = predictShown(phase, state.context);
    const note = `${duration(time.full)} → ${duration(time.without)}${phase === "decode" ? " a token" : ""}`;
    return tile(`${phase}-speedup`, `${phase === "prefill" ? "Prefill" : "Decode"} speed-up`, time.speedup, `${time.speedup.toFixed(2)}×`, note);
  });
  const cache = cacheBytes(state.context, skipped());
  const share = cache.full ? 1 - cache.without / cache.full : 0;
  tiles.push(tile("cache-bytes", "KV cache", cache.without, bytes(cache.without), `${bytes(cache.full)} in full, ${(100 * share).toFixed(0)} % less`));
  const left = report.sublayers.length - skipped().size;
  const body = bodySkipped().length;
  tiles.push(tile("sublayers-run", "Sublayers run", left, `${left} of ${report.sublayers.length}`,
    body ? `${body} of them not for the body of a prompt` : planned ? `${skipped().size} skipped from the first token on` : "an example: a plan says which"));
  const lost = body ? report.plan.prompt.measured?.quality : null;
  if (lost) {
    const facts = lost.found_full === null ? "facts were not asked for" : `of facts ${(100 * lost.found).toFixed(0)} % found, in full ${(100 * lost.found_full).toFixed(0)} %`;
    tiles.push(tile("perplexity", "Perplexity, as measured", Math.expm1(lost.loss), percent(lost.loss), facts));
  }
  const swept = report.sweep.filter((row) => row.is_plan);
  if (!lost && swept.length === 1 && state.set === "plan") {
    tiles.push(tile("perplexity", "Perplexity, in the sweep", Math.expm1(swept[0].loss), percent(swept[0].loss), `${swept[0].name}; the sweep is below`));
  }
  byId("tiles").replaceChildren(...tiles);
}

function showGains() {
  const [least, last] = [contexts[0], contexts[contexts.length - 1]];
  const place = (value) => Math.log(value / least) / Math.log(last / least || 2);
  const lines = phases.map((phase) => contexts.map((context) => [context, predictShown(phase, context).speedup]));
  const high = Math.max(1.1, ...lines.flat().map(([, gain]) => gain)) * 1.03;
  const marks = contexts.filter((context) => Number.isInteger(Math.log2(context)) && Math.log2(context) % 2 === 0);
  const chart = frame({ width: roomIn("gain-chart"), low: 1, high, xPlace: place, yLabel: "Predicted speed-up by context length", unit: "×",
    xTicks: marks.map((context) => [context, context >= 1024 ? `${context / 1024} k` : String(context)]) });
  chart.svg.append(draw("line", { class: "mark", x1: chart.x(state.context), x2: chart.x(state.context), y1: chart.top, y2: chart.bottom }));
  lines.forEach((points, index) => {
    const kind = index ? "ffn" : "attention";
    chart.svg.append(draw("path", { class: `line ${kind}`, d: path(points.map(([x, y]) => [chart.x(x), chart.y(y)])) }));
    const gain = predictShown(phases[index], state.context).speedup;
    chart.svg.append(draw("circle", { class: `dot ${kind}`, cx: chart.x(state.context), cy: chart.y(gain), r: 4.5 }));
  });
  const legend = make("ul", { class: "legend" }, ...phases.map((phase, index) => legendItem(index ? "ffn" : "attention", phase, "line")));
  byId("gain-chart").replaceChildren(legend, chart.svg);
}

// Before the shortest and after the longest context that was measured, times are taken to go on as they were.
function wasMeasured(context) {
  const { kind, contexts: measured } = report.timer;
  return kind !== "measured" || (measured[0] <= context && context <= measured[measured.length - 1]);
}

function update() {
  const text = `${count(state.context)} tokens${wasMeasured(state.context) ? "" : " (not measured)"}`;
  byId("context").value = String(contexts.indexOf(state.context));
  byId("context").setAttribute("aria-valuetext", text);
  byId("context-value").textContent = text;
  showTiles();
  showGains();
  showChosen();
  showTable();
  showFormulaValues();
  writeAddress();
}

function connect() {
  const slider = byId("context");
  slider.max = String(contexts.length - 1);
  slider.addEventListener("input", () => { state.context = contexts[Number(slider.value)]; update(); });
  byId("skip-set").append(...names.map((name) => make("option", { value: name }, name === "plan" ? `the plan (${skipSets.plan.size + report.sublayers.filter((row) => row.body_left).length})` : `${skipSets[name].size} sublayers, for illustration`)));
  byId("skip-set").value = state.set;
  byId("skip-set").addEventListener("change", (event) => { state.set = event.target.value; showStream(); showSimilarity(); update(); });
  byId("table-phase").append(...phases.map((phase) => make("option", { value: phase }, phase)));
  byId("table-phase").value = state.phase;
  byId("table-phase").addEventListener("change", (event) => { state.phase = event.target.value; showTable(); writeAddress(); });
  byId("filter").value = state.filter;
  byId("filter").addEventListener("input", (event) => { state.filter = event.target.value; showTable(); writeAddress(); });
  byId("grouped").checked = state.grouped;
  byId("grouped").addEventListener("change", (event) => { state.grouped = event.target.checked; showTable(); writeAddress(); });
  addEventListener("resize", () => { showStream(); showSimilarity(); showGains(); showSweepChart(); });
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
}

showHead();
readAddress();
if (report.sublayers.length) {
  connect();
  showStream();
  showSimilarity();
  showFormulas();
  showPasses();
  showSweep();
  showRuntime();
  update();
} else {
  byId("controls").hidden = true;
  for (const section of document.querySelectorAll("main > section")) section.hidden = !section.querySelector("#advice");
}
