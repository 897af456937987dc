// The list of jobs, kept up to date.
import { getJson, query, showNotice } from "./api.js";
import { byId, clip, duration, el, modelName, number, percent, pill, progressBar, shortId, took, when } from "./dom.js";

const KINDS = { "": "All", train: "Training", evaluate: "Evaluation", entropy: "Entropy", perturbation: "Perturbation", branch: "Branches" };
const NAMES = { train: "Training", evaluate: "Evaluation", entropy: "Entropy analysis", perturbation: "Perturbation", branch: "Branches" };
const state = { kind: "", pages: 1, timer: null };

function chooser() {
  const buttons = Object.entries(KINDS).map(([kind, label]) =>
    el("button", { type: "button", "aria-pressed": String(kind === state.kind), onclick: () => choose(kind) }, label));
  byId("kinds").replaceChildren(...buttons);
}

function choose(kind) {
  Object.assign(state, { kind, pages: 1 });
  chooser();
  refresh();
}

async function pages(path, values) {
  let rows = [], cursor = null, more = true;
  for (let page = 0; page < state.pages && more; page += 1) {
    const answer = await getJson(path + query({ ...values, cursor, limit: 50 }));
    rows = rows.concat(answer.data);
    cursor = answer.next_cursor;
    more = Boolean(answer.has_more);
  }
  return [rows, more];
}

const PATHS = { evaluate: "/evaluations", entropy: "/analyze/entropy", perturbation: "/analyze/perturbation", branch: "/analyze/branch" };
const address = (job) => `${((job.kind === "evaluate" || job.status === "succeeded") && PATHS[job.kind]) || "/runs"}/${job.run_id}`;

function subject(spec) {
  const algorithm = spec.algorithm ? spec.algorithm.toUpperCase() : null;
  return [algorithm, modelName(spec.model), spec.dataset && clip(spec.dataset, 64)].filter(Boolean).join(" · ");
}

function outcome(job, run) {
  if (job.error) return el("span", { class: "bad", title: job.error.message }, clip(`${job.error.code}: ${job.error.message}`, 60));
  const result = run?.result || {}, summary = run?.summary || {};
  if (result.acc) return `Acc ${percent(result.acc.value)}  (${percent(result.acc.low)} – ${percent(result.acc.high)})`;
  const contrast = (result.contrasts || [])[0];
  if (contrast) return `${contrast.first} − ${contrast.second} ${percent(contrast.difference)}  (${percent(contrast.low)} – ${percent(contrast.high)})`;
  if (summary.reward) return `reward ${number(summary.reward.last)}` + (summary.entropy ? `  ·  H ${number(summary.entropy.last)}` : "");
  return job.status_reason || "";
}

function progressCell(job) {
  const p = job.progress;
  if (!p || (job.is_terminal && job.status === "succeeded")) return "";
  const rest = p.eta_seconds ?? p.data?.eta_seconds;
  return [progressBar(p), el("span", { class: "muted small mono" }, `${p.phase} ${p.done}/${p.total}` + (rest && !job.is_terminal ? `  ·  ${duration(rest)} left` : ""))];
}

function row(job, run) {
  const spec = run?.spec || {};
  return el("tr", {},
    el("td", {}, el("a", { class: "strong", href: address(job) }, job.name || `${NAMES[job.kind] || job.kind} ${shortId(job.run_id)}`),
      el("div", { class: "muted small" }, [job.name ? NAMES[job.kind] : null, subject(spec)].filter(Boolean).join(" · "))),
    el("td", {}, pill(job.status, job.stalled)),
    el("td", { class: "wide" }, progressCell(job)),
    el("td", { class: "mono small" }, outcome(job, run)),
    el("td", { class: "num" }, duration(took(job))),
    el("td", { class: "num muted" }, when(job.created_at)));
}

async function refresh() {
  clearTimeout(state.timer);
  let busy = false;
  try {
    const [[jobs, more], [runs]] = await Promise.all([pages("/jobs", { kind: state.kind }), pages("/runs", { kind: state.kind })]);
    const byJob = new Map(runs.map((run) => [run.job_id, run]));
    byId("jobs").tBodies[0].replaceChildren(...jobs.map((job) => row(job, byJob.get(job.id))));
    byId("jobs").hidden = !jobs.length;
    byId("empty").hidden = jobs.length > 0;
    byId("empty").textContent = "Nothing here yet. POST a training to /jobs/train, or run: erpo demo";
    byId("more").hidden = !more;
    const active = jobs.filter((job) => !job.is_terminal).length;
    busy = active > 0;
    byId("count").textContent = jobs.length ? `${jobs.length}${more ? "+" : ""} jobs, ${active} active` : "";
    showNotice("");
  } catch (error) {
    showNotice(error.message);
  }
  state.timer = setTimeout(refresh, document.hidden ? 15000 : busy ? 1500 : 5000);
}

byId("more").addEventListener("click", () => { state.pages += 1; refresh(); });
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
chooser();
refresh();
