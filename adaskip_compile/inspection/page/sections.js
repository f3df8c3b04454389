"use strict";
// The sections on single sublayers: the stream, similarity, the table, formulas, passes, and what ran.

const CELL = 15;

function stateOf(row, phase) {
  if (planned && state.set === "plan") return row.phases[phase];
  return drawnSkipped().has(row.path) ? "skipped" : "kept";
}

function showStream() {
  const shown = planned && state.set === "plan" ? ["prefill", "window", "steady"] : ["every phase"];
  const kinds = [...new Set(report.sublayers.map((row) => row.kind))];
  const legend = kinds.map((kind) => legendItem(kind, kind));
  if (planned) legend.push(legendItem("rest skipped", "skipped: the stream is scaled"));
  if (bodySkipped().length) legend.push(legendItem("ffn body", "pale: skipped for the body of a prompt, keys and values kept"));
  if (report.plan?.watched.length && shown.length > 1) {
    legend.push(legendItem("ffn open", "with a hole: each request decides after its window"));
  }
  byId("legend").replaceChildren(...legend);
  byId("stream").replaceChildren(...shown.map((phase) => make("div", { class: "phase" },
    make("h3", {}, phaseTitle(phase)), make("div", { class: "chain" }, chain(phase)))));
}

function phaseTitle(phase) {
  if (phase === "every phase") return "In every phase";
  const about = { prefill: "the whole prompt at once", window: `the first ${report.plan.window} tokens, probed`, steady: "after the window" };
  return `${phase[0].toUpperCase()}${phase.slice(1)}: ${about[phase]}`;
}

// One line of the stream, or several below each other where a model is deeper than the page is wide.
function chain(phase) {
  const rows = report.sublayers;
  const room = (byId("stream").clientWidth || 1041) - 36;
  const lines = Math.ceil((rows.length * 11) / room);
  const perLine = 2 * Math.ceil(rows.length / lines / 2);
  const step = Math.min(34, room / Math.min(perLine, rows.length));
  const size = Math.min(CELL, step - 2);
  const [tall, middle] = [64, 32];
  const width = step * Math.min(perLine, rows.length) + 24;
  const svg = draw("svg", { width, height: tall * lines, role: "group", "aria-label": `Sublayers in ${phase}` });
  for (let line = 0; line < lines; line += 1) {
    const end = 22 + step * Math.min(perLine, rows.length - line * perLine);
    svg.append(draw("line", { class: "stream-line", x1: 2, x2: end, y1: tall * line + middle, y2: tall * line + middle }));
  }
  rows.forEach((row, index) => {
    const top = tall * Math.floor(index / perLine);
    const [x, above] = [12 + (index % perLine) * step, row.kind !== "ffn"];
    const is = stateOf(row, phase === "every phase" ? "prefill" : phase);
    const y = top + (above ? 5 : tall - 5 - size);
    const edge = above ? y + size : y;
    if (is !== "skipped") svg.append(draw("path", { class: "branch", d: `M${x - 1} ${top + middle}L${x + 2} ${edge}M${x + size - 2} ${edge}L${x + size + 1} ${top + middle}` }));
    const cell = draw("rect", { class: `cell ${row.kind} ${is}`, x, y, width: size, height: size, rx: 3, role: "button",
      tabindex: index === state.chosen ? 0 : -1, "aria-label": `${row.path}, ${row.kind}, ${is}`, "data-index": index });
    cell.append(draw("title", {}, `${row.path}: ${is}`));
    cell.addEventListener("click", () => choose(index));
    cell.addEventListener("focus", () => choose(index));
    cell.addEventListener("keydown", (event) => moveFocus(event, svg, index));
    svg.append(cell);
    if (is === "open") svg.append(hole(x + size / 2, y + size / 2, size / 4));
  });
  return svg;
}

function moveFocus(event, svg, index) {
  const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: report.sublayers.length - 1 }[event.key];
  const cell = to === undefined ? null : svg.querySelector(`[data-index="${to}"]`);
  if (!cell) return;
  event.preventDefault();
  cell.focus();
}

function choose(index) {
  state.chosen = index;
  for (const cell of document.querySelectorAll("#stream .cell")) {
    const is = Number(cell.dataset.index) === index;
    cell.classList.toggle("chosen", is);
    cell.setAttribute("tabindex", is ? 0 : -1);
  }
  showChosen();
}

function showChosen() {
  const row = report.sublayers[state.chosen];
  const facts = [["Sublayer", row.path], ["Kind", `${row.kind}${row.stateful ? ", keeps a cache" : ""}`], ["Parameters", count(row.parameters)]];
  for (const phase of phases) {
    const time = predict(phase, state.context, new Set());
    const part = time.groups[row.group];
    facts.push([`Time in ${phase}`, `${duration(part)}, ${((100 * part) / time.full).toFixed(2)} % of the step`]);
  }
  const cost = costAt(report.groups[row.group].cost, phases[phases.length - 1], state.context);
  facts.push(["Cache", bytes(cost.cache_bytes)]);
  if (row.similarity !== null) facts.push(["Similarity", row.similarity.toFixed(4)]);
  if (row.scale !== null) facts.push(["Scale", row.scale.toFixed(4)]);
  if (row.shared_with.length) facts.push(["Read by", row.shared_with.join(", ")]);
  byId("chosen").replaceChildren(...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

function showSimilarity() {
  const rows = report.sublayers.map((row, index) => ({ ...row, index })).filter((row) => row.similarity !== null);
  if (!rows.length) {
    byId("similarity-caption").textContent = "No profile was given: adaskip inspect --profile shows how similar each sublayer leaves the stream.";
    return;
  }
  byId("similarity-caption").textContent = "Cosine of the stream before and after each sublayer, mean over the profile; hollow where skipped.";
  const values = rows.map((row) => row.similarity);
  const sorted = [...values].sort((a, b) => a - b);
  // A first FFN that changes everything would press all others into a line: what lies far below is drawn at the edge.
  const low = Math.max(Math.min(...values), sorted[Math.floor(sorted.length * 0.1)] - 0.15);
  if (low > Math.min(...values)) byId("similarity-caption").append(` Those below ${low.toFixed(2)} are drawn at the edge.`);
  const pad = (Math.max(...values) - low) * 0.06 || 0.01;
  const last = report.sublayers.length - 1;
  const every = Math.max(1, Math.ceil(last / (roomIn("similarity-chart") / 90)));
  const chart = frame({ width: roomIn("similarity-chart"), height: 300, low: low - pad, high: Math.min(1, Math.max(...values) + pad), yLabel: "Similarity by depth",
    xPlace: (index) => 0.01 + (0.98 * index) / (last || 1), xTicks: rows.filter((row) => row.index % every === 0).map((row) => [row.index, String(row.index)]) });
  const edge = (value) => chart.y(Math.max(value, low - pad / 2));
  if (report.plan?.beta) chart.svg.append(draw("line", { class: "mark", x1: chart.left, x2: chart.right, y1: edge(report.plan.beta), y2: edge(report.plan.beta) }));
  for (const kind of new Set(rows.map((row) => row.kind))) {
    const own = rows.filter((row) => row.kind === kind);
    chart.svg.append(draw("path", { class: `line ${kind}`, d: path(own.map((row) => [chart.x(row.index), edge(row.similarity)])) }));
    for (const row of own) {
      const dot = draw("circle", { class: `dot ${kind} ${drawnSkipped().has(row.path) ? "skipped" : ""}`, cx: chart.x(row.index), cy: edge(row.similarity), r: 4 });
      dot.append(draw("title", {}, `${row.path}: ${row.similarity.toFixed(4)}`));
      chart.svg.append(dot);
    }
  }
  const legend = [...new Set(rows.map((row) => row.kind))].map((kind) => legendItem(kind, kind, "line"));
  if (report.plan?.beta) legend.push(make("li", {}, `dashed: the threshold, ${report.plan.beta.toFixed(4)}`));
  byId("similarity-chart").replaceChildren(make("ul", { class: "legend" }, ...legend), chart.svg);
}

// Columns of the table: what a row is sorted by, and what is shown of it. A group stands for its rows: figures are of one
// of them, the share of time is of all.
function columns() {
  const time = predict(state.phase, state.context, new Set());
  const costs = report.groups.map((group) => costAt(group.cost, state.phase, state.context));
  const share = (entry) => (time.groups[entry.row.group] / time.full) * entry.count;
  const cost = (part) => (entry) => costs[entry.row.group][part];
  const number = (title, value, text) => ({ title, value, text: (entry) => text(value(entry)) });
  const digits = (value) => value?.toFixed(4) ?? "–";
  const kept = ({ row }) => (state.phase === "prefill" ? row.phases.prefill : row.phases.steady);
  return [
    { title: "Sublayer", value: (entry) => entry.index, text: (entry) => entry.name },
    { title: "Kind", value: ({ row }) => row.kind, text: ({ row }) => row.kind },
    ...(planned ? [{ title: "Plan", value: kept, text: kept }] : []),
    number("Parameters", ({ row }) => row.parameters, count),
    number("Operations", cost("flops"), operations),
    number("Weights", cost("weight_bytes"), bytes),
    number("Moved", cost("activation_bytes"), bytes),
    number("Cache", cost("cache_bytes"), bytes),
    { title: "Share of time", value: share, text: (entry) => `${(100 * share(entry)).toFixed(2)} %`, bar: true },
    ...(report.sublayers.some((row) => row.similarity !== null) ? [number("Similarity", ({ row }) => row.similarity, digits)] : []),
    ...(planned ? [number("Scale", ({ row }) => row.scale, digits)] : []),
  ];
}

function tableEntries() {
  const wanted = state.filter.toLowerCase();
  const rows = report.sublayers.map((row, index) => ({ row, index, name: row.path, count: 1 }))
    .filter(({ row }) => `${row.path} ${row.kind}`.toLowerCase().includes(wanted));
  if (!state.grouped) return rows;
  const groups = new Map();
  for (const entry of rows) {
    const { row } = entry;
    const name = row.path.replaceAll(/\.\d+\./g, ".*.");
    const key = JSON.stringify([name, row.kind, row.group, row.phases, row.body_left, row.similarity, row.scale]);
    const group = groups.get(key);
    if (group) { group.count += 1; group.name = `${group.count} × ${name}`; } else groups.set(key, { ...entry });
  }
  return [...groups.values()];
}

function showTable() {
  const shown = columns();
  const [by, order] = state.sort.split(" ");
  const sorted = shown.find((column) => column.title.replaceAll(" ", "-") === by);
  const entries = tableEntries();
  if (sorted) entries.sort((a, b) => compare(sorted.value(a), sorted.value(b)) * (order === "down" ? -1 : 1));
  const shares = shown.find((column) => column.bar);
  const most = Math.max(...entries.map(shares.value));
  const rows = entries.map((entry) => make("tr", { class: drawnSkipped().has(entry.row.path) ? "skipped" : "" }, ...shown.map((column) => {
    const cell = make("td", column.title === "Kind" ? { class: entry.row.kind } : {}, column.text(entry));
    if (column.bar) cell.prepend(make("span", { class: `share ${entry.row.kind}`, style: `width:${Math.round((40 * column.value(entry)) / most)}px` }));
    return cell;
  })));
  const head = make("thead", {}, make("tr", {}, ...shown.map((column) => sortableHead(column, column === sorted ? order : ""))));
  byId("table").replaceChildren(head, make("tbody", {}, ...rows));
}

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  return a < b ? -1 : Number(a > b);
}

// A click sorts a column downwards, a second one upwards, a third puts the rows back in order.
function sortableHead(column, order) {
  const next = { "": "down", down: "up", up: "" }[order];
  const arrow = { "": "", down: " ↓", up: " ↑" }[order];
  const head = make("th", { scope: "col", "aria-sort": { "": "none", down: "descending", up: "ascending" }[order] });
  const button = make("button", { type: "button", class: "sort" }, column.title + arrow);
  button.addEventListener("click", () => {
    state.sort = next && `${column.title.replaceAll(" ", "-")} ${next}`;
    showTable();
    writeAddress();
    [...byId("table").querySelectorAll("th button")].find((one) => one.textContent.startsWith(column.title)).focus();
  });
  head.append(button);
  return head;
}
