"use strict";
// The cost model: what adaskip_compile.costs.timers does, from the same expressions and times.

const report = JSON.parse(document.getElementById("report").textContent);
const PARTS = ["flops", "weight_bytes", "activation_bytes", "cache_bytes"];

const FUNCTIONS = {
  Add: (...x) => x.reduce((a, b) => a + b, 0),
  Mul: (...x) => x.reduce((a, b) => a * b, 1),
  Pow: (a, b) => a ** b,
  Rational: (a, b) => a / b,
  Max: Math.max, Min: Math.min, Abs: Math.abs,
  floor: Math.floor, ceiling: Math.ceil,
  FloorToInt: Math.floor, CeilToInt: Math.ceil, TruncToInt: Math.trunc, ToFloat: (a) => a, Identity: (a) => a,
  FloorDiv: (a, b) => Math.floor(a / b), CleanDiv: (a, b) => a / b, IntTrueDiv: (a, b) => a / b,
  FloatTrueDiv: (a, b) => a / b, CeilDiv: (a, b) => Math.ceil(a / b),
  Mod: (a, b) => a % b, PythonMod: (a, b) => ((a % b) + b) % b,
  ModularIndexing: (a, b, c) => Math.floor(a / b) % c,
  PowByNatural: (a, b) => a ** b, FloatPow: (a, b) => a ** b,
};

function evaluate(tree, sizes) {
  if (typeof tree === "number") return tree;
  if (typeof tree === "string") return sizes[tree];
  const [name, ...parts] = tree;
  return (FUNCTIONS[name] ?? (() => NaN))(...parts.map((part) => evaluate(part, sizes)));
}

function sizesAt(phase, context) {
  return { b: 1, q: phase === "prefill" ? context : 1, t: context };
}

function costAt(costs, phase, context) {
  const sizes = sizesAt(phase, context);
  return Object.fromEntries(PARTS.map((part) => [part, evaluate(costs[phase][part].tree, sizes)]));
}

function interpolate(xs, ys, x) {
  if (xs.length === 1 || x <= xs[0]) return ys[0];
  let right = xs.findIndex((each) => each > x);
  if (right < 0) right = xs.length - 1;
  const [x0, x1, y0, y1] = [xs[right - 1], xs[right], ys[right - 1], ys[right]];
  return x < x1 || y1 > y0 ? y0 + ((y1 - y0) * (x - x0)) / (x1 - x0) : y1;
}

// Seconds of one sublayer of a group; the rest of the model comes after the last group.
function seconds(index, phase, context) {
  const timer = report.timer;
  if (timer.kind === "measured") {
    const tokens = phase === "prefill" ? context : 1;
    return Math.max(0, tokens * interpolate(timer.contexts, timer.tables[phase][index], context));
  }
  const costs = index < report.groups.length ? report.groups[index].cost : report.rest;
  const cost = costAt(costs, phase, context);
  return Math.max(cost.flops / timer.flops, (cost.weight_bytes + cost.activation_bytes) / timer.bandwidth);
}

// Of the sublayers in `saved` a share is left out, of those in `skipped` all.
function predict(phase, context, skipped, saved = new Map()) {
  const groups = report.groups.map((_, index) => seconds(index, phase, context));
  const rest = seconds(report.groups.length, phase, context);
  const sum = (rows) => rows.reduce((total, row) => total + groups[row.group], 0);
  const full = rest + sum(report.sublayers);
  const share = (row) => (skipped.has(row.path) ? 1 : saved.get(row.path) ?? 0);
  const without = full - report.sublayers.reduce((total, row) => total + groups[row.group] * share(row), 0);
  return { groups, rest, full, without, speedup: full / without };
}

function cacheBytes(context, skipped) {
  const phase = phases[phases.length - 1];
  const each = report.groups.map((group) => costAt(group.cost, phase, context).cache_bytes);
  const sum = (rows) => rows.reduce((total, row) => total + each[row.group], 0);
  return { full: sum(report.sublayers), without: sum(report.sublayers.filter((row) => !skipped.has(row.path))) };
}

const phases = ["prefill", "decode"].filter((phase) => phase in report.rest);
