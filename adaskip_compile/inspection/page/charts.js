"use strict";
// Drawing: small SVGs made by hand. Colours come from the style sheet by class.

const SVG = "http://www.w3.org/2000/svg";

function draw(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function make(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const count = (value) => Math.round(value).toLocaleString("en");

function scaled(value, units, base) {
  if (!isFinite(value)) return "?";
  let index = 0;
  while (Math.abs(value) >= base && index < units.length - 1) { value /= base; index += 1; }
  return `${value >= 100 ? value.toFixed(0) : Number(value.toPrecision(3))} ${units[index]}`.trim();
}

const bytes = (value) => scaled(value, ["B", "kB", "MB", "GB", "TB", "PB"], 1000);
const operations = (value) => scaled(value, ["", "k", "M", "G", "T", "P", "E"], 1000);
// A loss in nats a token, as what it makes of perplexity.
const percent = (loss) => `${loss < 0 ? "" : "+"}${(100 * Math.expm1(loss)).toFixed(1)} %`;
function duration(value) {
  if (value >= 1) return `${Number(value.toPrecision(3))} s`;
  return value >= 1e-3 ? `${Number((value * 1e3).toPrecision(3))} ms` : `${Number((value * 1e6).toPrecision(3))} µs`;
}

function ticks(low, high, wanted) {
  const raw = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= raw);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push(at);
  return { found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

// A chart that is not shown has no width, and is drawn again when it is.
const roomIn = (id) => Math.max(document.getElementById(id).clientWidth, 160);

// A frame with axes. `series` are [{kind, label, points: [[x, y]], dots}], x as x(value) places it.
function frame({ width, height = 260, low, high, xTicks, xPlace, yLabel, unit = "", wanted = 5 }) {
  const [left, right, top, bottom] = [54, width - 16, 14, height - 30];
  const y = (value) => bottom - ((value - low) / (high - low)) * (bottom - top);
  const x = (value) => left + xPlace(value) * (right - left);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, width: "100%", role: "img", "aria-label": yLabel });
  const scale = ticks(low, high, wanted);
  for (const value of scale.found) {
    svg.append(
      draw("line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) }),
      draw("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(scale.digits) + unit),
    );
  }
  for (const [value, label] of xTicks) {
    svg.append(draw("text", { x: x(value), y: height - 8, "text-anchor": "middle" }, label));
  }
  return { svg, x, y, left, right, top, bottom };
}

function path(points) {
  return points.map(([px, py], index) => `${index ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`).join("");
}

// What is not decided yet is filled, as what runs is, and has a hole.
const hole = (cx, cy, r) => draw("circle", { class: "hole", cx, cy, r });

function legendItem(kind, label, shape = "square") {
  const svg = draw("svg", { width: 16, height: 14, "aria-hidden": "true" });
  if (shape === "line") svg.append(draw("path", { class: `line ${kind}`, d: "M0 7L16 7" }));
  else svg.append(draw("rect", { class: `cell ${kind}`, x: 2, y: 1, width: 12, height: 12, rx: 3 }));
  if (kind.endsWith(" open")) svg.append(hole(8, 7, 3));
  return make("li", {}, svg, label);
}
