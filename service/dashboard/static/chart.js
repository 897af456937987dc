// A small line chart in SVG: min/max band, pale raw line below a smoothed one, crosshair, markers, picking.
import { el, number } from "./dom.js";

const NS = "http://www.w3.org/2000/svg";
const MARGIN = { top: 8, right: 10, bottom: 20, left: 48 };

function svg(tag, attributes, parent) {
  const node = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  parent?.append(node);
  return node;
}

function ticks(low, high, wanted) {
  const raw = (high - low) / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw);
  const found = [];
  for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-6; t += step) found.push(Math.abs(t) < step * 1e-6 ? 0 : t);
  return found;
}

function bounds(series, fromZero) {
  let low = Infinity, high = -Infinity;
  for (const column of [series.value, series.min, series.max]) {
    for (const v of column || []) {
      if (v === null || v === undefined) continue;
      if (v < low) low = v;
      if (v > high) high = v;
    }
  }
  if (low === Infinity) return [0, 1];
  if (fromZero || (low >= 0 && low < 0.6 * high)) low = Math.min(0, low);
  if (high - low < 1e-12) return [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  const room = 0.06 * (high - low);
  return [low === 0 ? 0 : low - room, high + room];
}

export class LineChart {
  // options: title, unit, colour (a CSS variable's name), height, fromZero, onHover(index|null), onPick(index),
  // markers (indices), xName
  constructor(parent, options) {
    this.options = { height: 150, colour: "--line-1", xName: "step", ...options };
    this.value = el("span", { class: "chart-value mono" });
    this.plot = el("div", { class: "chart-plot" });
    const heading = el("figcaption", {}, el("span", { class: "chart-title" }, options.title), this.value);
    this.node = el("figure", { class: "chart" }, heading, this.plot);
    parent.append(this.node);
    this.series = { step: [], value: [] };
    this.cursor = null;
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.plot);
    this.plot.addEventListener("pointermove", (event) => this.hover(event));
    this.plot.addEventListener("pointerleave", () => { this.point(null); this.options.onHover?.(null); });
    this.plot.addEventListener("click", (event) => this.options.onPick?.(this.nearest(event)));
  }

  update(series, markers = []) {
    this.series = series;
    this.markers = markers;
    this.draw();
  }

  draw() {
    const width = this.plot.clientWidth, height = this.options.height;
    if (!width) return;
    const steps = this.series.step;
    const [low, high] = bounds(this.series, this.options.fromZero);
    const first = steps[0] ?? 0, last = steps.length > 1 ? steps[steps.length - 1] : first + 1;
    this.x = (s) => MARGIN.left + ((s - first) / (last - first)) * (width - MARGIN.left - MARGIN.right);
    this.y = (v) => MARGIN.top + ((high - v) / (high - low)) * (height - MARGIN.top - MARGIN.bottom);
    this.svg = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": this.describe() });
    this.svg.style.setProperty("--line", `var(${this.options.colour})`);
    this.axes(width, height, low, high, first, last);
    if (this.series.min && this.series.downsampled) svg("path", { class: "band", d: this.band() }, this.svg);
    const smoothed = this.series.smoothed;
    svg("path", { class: smoothed ? "raw" : "line", d: this.path(this.series.value) }, this.svg);
    if (smoothed) svg("path", { class: "line", d: this.path(smoothed) }, this.svg);
    if (steps.length > 0 && steps.length <= 40) this.dots(this.series.value, smoothed ? "dot pale" : "dot");
    for (const index of this.markers || []) this.marker(index);
    this.cursorLine = svg("line", { class: "cursor", y1: MARGIN.top, y2: height - MARGIN.bottom, visibility: "hidden" }, this.svg);
    this.cursorDot = svg("circle", { class: "cursor-dot", r: 3.5, visibility: "hidden" }, this.svg);
    this.plot.replaceChildren(this.svg);
    this.point(this.cursor);
  }

  axes(width, height, low, high, first, last) {
    for (const t of ticks(low, high, 3)) {
      svg("line", { class: t === 0 && low < 0 ? "zero" : "rule", x1: MARGIN.left, x2: width - MARGIN.right, y1: this.y(t), y2: this.y(t) }, this.svg);
      svg("text", { class: "tick", x: MARGIN.left - 6, y: this.y(t) + 3.5, "text-anchor": "end" }, this.svg).textContent = number(t, 2);
    }
    const labels = ticks(first, last, Math.min(6, width / 80)).filter(Number.isInteger);
    for (const t of labels) {
      svg("text", { class: "tick", x: this.x(t), y: height - 5, "text-anchor": "middle" }, this.svg).textContent = t;
    }
  }

  path(values) {
    let d = "", pen = false;
    values.forEach((v, i) => {
      if (v === null || v === undefined) { pen = false; return; }
      d += `${pen ? "L" : "M"}${this.x(this.series.step[i]).toFixed(1)} ${this.y(v).toFixed(1)}`;
      pen = true;
    });
    return d;
  }

  band() {
    const { step, min, max } = this.series;
    const kept = step.map((_, i) => i).filter((i) => min[i] !== null && max[i] !== null);
    const at = (i, v) => `${this.x(step[i]).toFixed(1)} ${this.y(v).toFixed(1)}`;
    if (!kept.length) return "";
    return `M${kept.map((i) => at(i, max[i])).join("L")}L${kept.reverse().map((i) => at(i, min[i])).join("L")}Z`;
  }

  dots(values, style) {
    values.forEach((v, i) => {
      if (v !== null) svg("circle", { class: style, cx: this.x(this.series.step[i]), cy: this.y(v), r: 2 }, this.svg);
    });
  }

  marker(index) {
    const value = this.series.value[index];
    if (value === null || value === undefined) return;
    const x = this.x(this.series.step[index]), y = this.y(value) - 4;
    svg("path", { class: "marker", d: `M${x} ${y}l-3.5 -6h7Z`, transform: `rotate(180 ${x} ${y - 3})` }, this.svg);
  }

  nearest(event) {
    const { step } = this.series;
    if (!step.length) return null;
    const x = event.clientX - this.plot.getBoundingClientRect().left;
    let best = 0;
    step.forEach((s, i) => { if (Math.abs(this.x(s) - x) < Math.abs(this.x(step[best]) - x)) best = i; });
    return best;
  }

  hover(event) {
    const index = this.nearest(event);
    this.point(index);
    this.options.onHover?.(index);
  }

  // Put the crosshair on a point, or take it away with null.
  point(index) {
    this.cursor = index;
    const { step, value, smoothed } = this.series;
    const shown = index ?? step.length - 1;
    const unit = this.options.unit ? ` ${this.options.unit}` : "";
    this.value.textContent = step.length
      ? (index === null ? "" : `${this.options.xName} ${step[shown]}  `) + number((smoothed || value)[shown]) + unit
      : "";
    const visible = index !== null && value[index] !== null && value[index] !== undefined && this.x;
    this.cursorLine?.setAttribute("visibility", visible ? "visible" : "hidden");
    this.cursorDot?.setAttribute("visibility", visible ? "visible" : "hidden");
    if (!visible) return;
    this.cursorLine.setAttribute("x1", this.x(step[index]));
    this.cursorLine.setAttribute("x2", this.x(step[index]));
    this.cursorDot.setAttribute("cx", this.x(step[index]));
    this.cursorDot.setAttribute("cy", this.y((smoothed || value)[index]));
  }

  describe() {
    const known = this.series.value.filter((v) => v !== null && v !== undefined);
    if (!known.length) return `${this.options.title}: no values yet`;
    return `${this.options.title}: ${number(known[0])} at first, ${number(known[known.length - 1])} at last, ` +
      `lowest ${number(Math.min(...known))}, highest ${number(Math.max(...known))}`;
  }
}
