// Elements and words. Text only ever enters the page through textContent: what a model wrote stays text.

export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "dataset") Object.assign(node.dataset, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

export const byId = (id) => document.getElementById(id);

export function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value).replace("-", "−");
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(1).replace("e+", "e");
  return value.toLocaleString("en", { maximumSignificantDigits: digits, useGrouping: false }).replace("-", "−");
}

// An entropy of an object, or what it is at least where no more is known: `field` may be that of a pivot or of a list.
export const entropyText = (one, digits = 3, field = "entropy") =>
  one[`${field}_low`] === undefined ? `H ${number(one[field], digits)}` : `H ≥ ${number(one[`${field}_low`], digits)}`;

export const percent = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)}%`);

export function duration(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} m ${String(s % 60).padStart(2, "0")} s`;
  return `${Math.floor(s / 3600)} h ${String(Math.floor((s % 3600) / 60)).padStart(2, "0")} m`;
}

export function took(job) {
  if (!job.started_at) return null;
  const end = job.finished_at ? Date.parse(job.finished_at) : Date.now();
  return (end - Date.parse(job.started_at)) / 1000;
}

export function when(text) {
  if (!text) return "–";
  const date = new Date(text);
  const today = date.toDateString() === new Date().toDateString();
  return today
    ? date.toLocaleTimeString("en-GB")
    : date.toLocaleString("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });
}

const MARKS = { right: "✓", wrong: "✗", timeout: "⌛", unparsable: "∅", crashed: "!" };

// What the verifier said of an answer, as one sign.
export const verdictMark = (verdict) =>
  el("span", { class: `verdict ${verdict === "right" ? "good" : "bad"}`, title: verdict, "aria-label": verdict }, MARKS[verdict] || "?");

export const pill = (status, stalled = false) =>
  el("span", { class: `pill is-${status}`, title: stalled ? "No worker has taken it yet" : null }, stalled ? `${status} · waiting for a worker` : status);

export function progressBar(progress) {
  const share = progress && progress.total ? Math.min(1, progress.done / progress.total) : 0;
  const fill = el("span", { class: "meter-fill" });
  fill.style.width = `${(100 * share).toFixed(1)}%`;
  return el("span", {
    class: "meter", role: "progressbar", "aria-valuemin": "0", "aria-valuemax": "100",
    "aria-valuenow": String(Math.round(100 * share)), "aria-label": "Progress",
  }, fill);
}

export function modelName(model) {
  if (!model) return "";
  return typeof model === "string" ? model : `${model.run.slice(0, 4)}…${model.run.slice(-6)} @ ${model.checkpoint ?? "last"}`;
}

export const shortId = (id) => (id.length > 16 ? `${id.slice(0, id.indexOf("_") + 1)}…${id.slice(-8)}` : id);
export const clip = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

// Visible text: breaks and tabs marked, control characters as pictures.
export function visible(text) {
  return text.replace(/[\u0000-\u0009\u000b-\u001f\u007f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g, (c) => {
    const code = c.charCodeAt(0);
    if (code === 9) return "⇥";
    if (code < 32) return String.fromCharCode(0x2400 + code);
    return code === 127 ? "␡" : "·";
  });
}
