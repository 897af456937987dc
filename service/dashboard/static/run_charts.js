// The curves of a run: one small chart a metric, the telling ones first.
import { getJson, query } from "./api.js";
import { LineChart } from "./chart.js";
import { byId } from "./dom.js";

const EVALUATION = /^eval\//;
const EVALUATION_EMA = 0.2; // weight of the newest point, as in the paper's Fig. 2
const FIRST = [
  [/^reward$/, "Reward", "--line-1"], [/^entropy$/, "Entropy, nats", "--line-2"],
  [/^eval\/.*\/acc$/, null, "--line-1"], [EVALUATION, null, "--line-4"],
  [/^rewards?\/accuracy/, "Accuracy", "--line-1"], [/^kl$/, "KL to the reference", "--line-3"],
  [/^rewards?\//, null, "--line-1"], [/mean_length$/, "Mean length, tokens", "--line-4"],
  [/^erpo\/frac_dead_groups$/, "Dead groups", "--line-5"], [/^erpo\/progress_snr$/, "Progress, signal to noise", "--line-5"],
];

// y_0 = x_0, y_t = alpha x_t + (1 - alpha) y_(t-1)
function ema(values, alpha) {
  let last = null;
  return values.map((v) => {
    if (v !== null) last = last === null ? v : alpha * v + (1 - alpha) * last;
    return last;
  });
}

export class Charts {
  constructor(runId) {
    this.runId = runId;
    this.charts = new Map();
    const slider = byId("smoothing");
    slider.value = localStorage.getItem("erpo-smoothing") || "0";
    slider.addEventListener("input", () => {
      localStorage.setItem("erpo-smoothing", slider.value);
      this.label();
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.refresh(), 120);
    });
    this.label();
  }

  get weight() { return Number(byId("smoothing").value) / 100; }

  label() { byId("smoothing-value").textContent = this.weight ? this.weight.toFixed(2) : "off"; }

  async refresh() {
    const values = { max_points: 1000, smoothing: this.weight || undefined };
    const answer = await getJson(`/runs/${this.runId}/metrics${query(values)}`);
    const names = Object.keys(answer.series || {}).filter((name) => answer.series[name].step.length);
    byId("charts-section").hidden = !names.length;
    names.sort((a, b) => this.place(a) - this.place(b) || a.localeCompare(b));
    for (const name of names) this.chart(name).update(this.drawn(name, answer.series[name]));
    const others = names.filter((name) => this.place(name) === FIRST.length).length;
    byId("more-charts").hidden = !others;
    byId("more-count").textContent = others ? `(${others})` : "";
  }

  // Evaluations are few and noisy: their curve is always the average, over the points as measured.
  drawn(name, series) {
    return EVALUATION.test(name) ? { ...series, smoothed: ema(series.value, EVALUATION_EMA) } : series;
  }

  place(name) {
    const found = FIRST.findIndex(([pattern]) => pattern.test(name));
    return found < 0 ? FIRST.length : found;
  }

  chart(name) {
    if (!this.charts.has(name)) {
      const place = this.place(name);
      const [, title, colour] = FIRST[place] || [null, null, "--line-6"];
      const parent = byId(place < FIRST.length ? "charts" : "charts-more");
      const chart = new LineChart(parent, { title: title || (EVALUATION.test(name) ? `${name} (EMA ${EVALUATION_EMA})` : name), colour });
      chart.node.title = name;
      chart.place = place;
      // Names come in the order of their first value: each chart goes to its own place.
      const later = [...this.charts.entries()].filter(([, c]) => c.node.parentNode === parent)
        .sort(([a, x], [b, y]) => x.place - y.place || a.localeCompare(b))
        .find(([other, c]) => c.place > place || (c.place === place && other.localeCompare(name) > 0));
      if (later) parent.insertBefore(chart.node, later[1].node);
      this.charts.set(name, chart);
    }
    return this.charts.get(name);
  }
}
