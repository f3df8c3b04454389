"use strict";
// The sections that do not change: formulas (their values do), the passes, and what really ran.

const PART_NAMES = { flops: "operations", weight_bytes: "weight bytes", activation_bytes: "bytes moved", cache_bytes: "cache bytes" };

function formula(text) {
  const cell = make("td", { class: "formula" });
  for (const [index, piece] of text.replaceAll(/\*\*(\d+)/g, "\u0001$1\u0001").replaceAll("*", "·").split("\u0001").entries()) {
    cell.append(index % 2 ? make("sup", {}, piece) : piece);
  }
  return cell;
}

function showFormulas() {
  const parts = [...report.groups.map((group) => [`${group.kind}, ${group.count} alike`, group.cost]), ["everything else", report.rest]];
  const rows = parts.flatMap(([name, costs], index) => phases.flatMap((phase) => PARTS.filter((part) => costs[phase][part].tree !== 0 && !(index === report.groups.length && part === "cache_bytes")).map((part) =>
    make("tr", {}, make("td", {}, name), make("td", {}, phase), make("td", {}, PART_NAMES[part]), formula(costs[phase][part].text),
      make("td", { "data-group": index, "data-phase": phase, "data-part": part })))));
  const head = make("thead", {}, make("tr", {}, ...["Sublayers", "Phase", "What", "Formula", "Value"].map((name) => make("th", { scope: "col" }, name))));
  byId("formulas").replaceChildren(make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Cost formulas" }, make("table", {}, head, make("tbody", {}, ...rows))));
}

function showFormulaValues() {
  for (const cell of document.querySelectorAll("#formulas td[data-part]")) {
    const { group, phase, part } = cell.dataset;
    const costs = report.groups[Number(group)]?.cost ?? report.rest;
    cell.textContent = count(evaluate(costs[phase][part].tree, sizesAt(phase, state.context)));
  }
}

function showPasses() {
  byId("passes-section").hidden = !report.steps.length;
  const byPhase = Map.groupBy ? Map.groupBy(report.steps, (step) => step.phase) : report.steps.reduce((found, step) => found.set(step.phase, [...(found.get(step.phase) ?? []), step]), new Map());
  for (const [phase, steps] of byPhase) {
    byId("passes").append(make("h3", {}, `The ${phase} graph`), ...steps.map(passStep));
  }
}

function passStep(step) {
  const what = step.modified ? `${count(step.matched)} matched, ${count(step.nodes_before)} → ${count(step.nodes_after)} nodes` : "changes nothing";
  const [name, options] = [step.text.slice(0, step.text.indexOf("{")), step.text.slice(step.text.indexOf("{"))];
  const title = make("summary", {}, make("code", {}, name), make("span", { class: "quiet" }, what));
  const details = make("details", {}, title);
  details.addEventListener("toggle", () => {
    if (!details.open || details.children.length > 1) return;
    if (options !== "{}") details.append(make("p", { class: "quiet" }, make("code", {}, options)));
    if (step.diff) details.append(diffText(step.diff));
  });
  return details;
}

function diffText(diff) {
  const kinds = { "+": "plus", "-": "minus", "@": "at" };
  const lines = diff.split("\n").slice(2);
  const box = make("pre", { tabindex: 0 }, ...lines.slice(0, 4000).map((line) => make("span", { class: kinds[line[0]] ?? "" }, line || " ")));
  if (lines.length > 4000) box.append(`${count(lines.length - 4000)} more lines: debug_dir= writes them all`);
  return box;
}

function showSweep() {
  byId("sweep-section").hidden = !report.sweep.length;
  if (!report.sweep.length) return;
  showSweepChart();
  const spread = ({ median, low, high }) => `${median.toFixed(2)}× (${low.toFixed(2)} to ${high.toFixed(2)})`;
  const rows = report.sweep.map((row) => make("tr", {}, ...[
    row.is_plan ? `${row.name} (the plan)` : row.name, `${row.loss < 0 ? "" : "+"}${row.loss.toFixed(3)}`, percent(row.loss),
    ...["request", "prefill", "decode"].map((part) => spread(row.speedup[part])), bytes(row.cache_bytes),
  ].map((cell) => make("td", {}, cell))));
  const heads = ["Plan", "Nats a token", "Perplexity", "Request", "Prefill", "Decode", "KV cache"];
  const head = make("thead", {}, make("tr", {}, ...heads.map((name) => make("th", { scope: "col" }, name))));
  byId("sweep").replaceChildren(make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Plans of the sweep" }, make("table", {}, head, make("tbody", {}, ...rows))));
}

function showSweepChart() {
  if (!report.sweep.length) return;
  const losses = report.sweep.map((row) => row.loss);
  const speeds = report.sweep.flatMap((row) => Object.values(row.speedup.request));
  const [slowest, fastest] = [Math.min(1, ...speeds), Math.max(1.01, ...speeds)];
  const [least, most] = [Math.min(0, ...losses), Math.max(0.01, ...losses)];
  const chart = frame({ width: roomIn("sweep-chart"), low: least, high: least + 1.08 * (most - least), yLabel: "Loss over speed-up of a request",
    xPlace: (speed) => 0.02 + (0.96 * (speed - slowest)) / (fastest - slowest),
    xTicks: ticks(slowest, fastest, 5).found.map((speed) => [speed, `${speed.toFixed(2)}×`]) });
  for (const row of report.sweep) {
    const { median, low, high } = row.speedup.request;
    const y = chart.y(row.loss);
    const dot = draw("circle", { class: `dot ${row.is_plan ? "ffn" : "attention"}`, cx: chart.x(median), cy: y, r: row.is_plan ? 6 : 4 });
    dot.append(draw("title", {}, `${row.name}: ${median.toFixed(2)}×, ${row.loss.toFixed(3)} nats a token`));
    chart.svg.append(draw("line", { class: "grid", x1: chart.x(low), x2: chart.x(high), y1: y, y2: y }), dot);
  }
  byId("sweep-chart").replaceChildren(chart.svg);
}

function showRuntime() {
  const sessions = report.runtime?.sessions ?? [];
  byId("runtime-section").hidden = !sessions.length;
  for (const session of sessions) {
    const heads = ["Request", "Batch", "Prefill", "Window", "Steady", "Prefill time", "A token", "Skipped", "Added", "KV cache"];
    const rows = session.requests.map((request) => {
      const decoded = request.tokens.window + request.tokens.steady;
      const pace = decoded ? duration((request.seconds.window + request.seconds.steady) / decoded) : "–";
      const cells = [request.number, request.batch, ...["prefill", "window", "steady"].map((phase) => count(request.tokens[phase])),
        duration(request.seconds.prefill), pace, Object.keys(request.skipped).length, Object.keys(request.extra).length, bytes(request.kv_bytes)];
      return make("tr", {}, ...cells.map((cell) => make("td", {}, String(cell))));
    });
    const head = make("thead", {}, make("tr", {}, ...heads.map((name) => make("th", { scope: "col" }, name))));
    byId("runtime").append(make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Requests" }, make("table", {}, head, make("tbody", {}, ...rows))));
    const added = session.requests.filter((request) => Object.keys(request.extra).length).map((request) => `Request ${request.number} skipped these too after its window: ${Object.keys(request.extra).join(", ")}`);
    const notes = [...added, ...session.graphs.filter((graph) => graph.captured_because).map((graph) => `A ${graph.phase} graph was captured because this did not hold: ${graph.captured_because}`), ...session.unskipped_graphs, ...session.notes];
    byId("runtime").append(make("ul", {}, ...notes.map((note) => make("li", {}, note))));
  }
}
