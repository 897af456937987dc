// Numbers with their intervals: as text, and drawn on one scale.
import { percent } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 160, HEIGHT = 16;

function shape(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

export const span = (v, show = percent, to = " – ") => (v?.low === null || v?.low === undefined ? "" : show(v.low) + to + show(v.high));
export const points = (v) => (v === null || v === undefined ? "–" : `${v > 0 ? "+" : ""}${(100 * v).toFixed(1)}`.replace("-", "−"));

// A dot with a whisker between `from` and `to`, a rule where nothing changes.
export function drawInterval(v, { from = 0, to = 1, zero = null, label = "" } = {}) {
  const x = (value) => ((Math.min(to, Math.max(from, value)) - from) / (to - from)) * (WIDTH - 8) + 4;
  const svg = shape("svg", { class: "interval", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, width: WIDTH, height: HEIGHT, role: "img", "aria-label": label });
  svg.append(shape("line", { class: "interval-track", x1: 4, x2: WIDTH - 4, y1: HEIGHT / 2, y2: HEIGHT / 2 }));
  if (zero !== null) svg.append(shape("line", { class: "interval-zero", x1: x(zero), x2: x(zero), y1: 0, y2: HEIGHT }));
  if (v?.low !== null && v?.low !== undefined) svg.append(shape("line", { class: "interval-whisker", x1: x(v.low), x2: x(v.high), y1: HEIGHT / 2, y2: HEIGHT / 2 }));
  const side = zero === null || !v ? "" : v.low > zero ? " is-above" : v.high < zero ? " is-below" : "";
  if (v) svg.append(shape("circle", { class: `interval-dot${side}`, cx: x(v.value), cy: HEIGHT / 2, r: 4 }));
  return svg;
}
