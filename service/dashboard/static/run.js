// The page of one run: follows the job's events and shows what has been recorded.
import { follow, getJson, postJson, query, showNotice } from "./api.js";
import { Charts } from "./run_charts.js";
import { Completions } from "./run_completions.js";
import { byId, duration, el, modelName, number, percent, pill, progressBar, shortId, took, when } from "./dom.js";

const runId = document.body.dataset.runId;
const state = { run: null, job: null, progress: null, streaming: false };
const charts = new Charts(runId);
const completions = new Completions(runId);

// Do the work at most once a second, and once more after the last call.
function throttled(work) {
  let due = false, waiting = false;
  const turn = async () => {
    due = false;
    waiting = true;
    try { await work(); } catch (error) { if (error.status !== 404) showNotice(error.message); }
    setTimeout(() => { waiting = false; if (due) turn(); }, 1000);
  };
  return () => { due = true; if (!waiting) turn(); };
}

const refreshRun = throttled(async () => {
  state.run = await getJson(`/runs/${runId}`);
  showFacts();
  showTiles();
  showConfig("config", "config-section", state.run.spec);
  showConfig("resolved", "resolved-section", state.run.resolved);
});
const refreshJob = throttled(async () => {
  if (!state.run?.job_id) return;
  state.job = await getJson(`/jobs/${state.run.job_id}`);
  state.progress = state.job.progress || state.progress;
  showJob();
  showProgress();
});
const refreshCharts = throttled(() => charts.refresh());
const refreshCompletions = throttled(() => completions.refresh(state.run));
const refreshTraces = throttled(async () => {
  if (state.run.kind !== "train") return;
  const page = await getJson(`/runs/${runId}/traces${query({ limit: 50 })}`);
  byId("traces-section").hidden = !page.data.length;
  byId("traces").tBodies[0].replaceChildren(...page.data.map(traceRow));
});
const refreshCheckpoints = throttled(async () => {
  const page = await getJson(`/runs/${runId}/checkpoints`);
  byId("checkpoints-section").hidden = !page.data.length;
  byId("checkpoints").replaceChildren(...page.data.map(checkpointItem));
});

function traceRow(trace) {
  return el("tr", {},
    el("td", { class: "clipped" }, el("a", { href: `/runs/${runId}/traces/${trace.n}` }, trace.completion || `answer ${trace.n}`)),
    ...[trace.step, trace.num_tokens, trace.reward, trace.advantage, trace.stats?.h_mean, trace.stats?.h_max].map((v) => el("td", { class: "num" }, number(v))));
}

function checkpointItem(checkpoint) {
  const bytes = (checkpoint.files || []).reduce((sum, file) => sum + (file.size ?? file.bytes ?? 0), 0) || checkpoint.size_bytes;
  const size = bytes ? ` · ${(bytes / 2 ** 20).toFixed(1)} MiB` : "";
  return el("li", {}, el("strong", {}, `Step ${checkpoint.step}`), el("span", { class: "muted" }, `${size} · ${when(checkpoint.created_at)}`));
}

function showJob() {
  const { job } = state;
  byId("status").replaceChildren(pill(job.status, job.stalled));
  byId("name").textContent = job.name || { train: "Training", evaluate: "Evaluation", entropy: "Entropy analysis", perturbation: "Perturbation", branch: "Branches" }[job.kind] || job.kind;
  document.title = `${job.status} · ${byId("name").textContent} · ERPO Lab`;
  byId("actions").replaceChildren(...actions(job));
  const trouble = byId("error");
  trouble.hidden = !job.error;
  if (job.error) {
    trouble.replaceChildren(el("strong", {}, job.error.code || "failed"), ` ${job.error.message || ""}`,
      job.error.log_tail ? el("pre", {}, job.error.log_tail) : "");
  }
  showFacts();
}

function actions(job) {
  const act = (label, action, body) => el("button", { type: "button", class: action === "cancel" ? "button danger" : "button", onclick: () => perform(label, action, body) }, label);
  const buttons = [];
  const shown = { entropy: "Open the heat map", perturbation: "Open the figure", branch: "Open the tree" }[job.kind];
  if (shown) buttons.push(el("a", { class: "button main", href: `/analyze/${job.kind}/${runId}` }, shown));
  if (["queued", "starting", "running"].includes(job.status)) {
    if (job.kind === "train") buttons.push(act("Pause", "pause"));
    buttons.push(act("Cancel", "cancel", { mode: "checkpoint" }));
  }
  if (job.status === "paused") buttons.push(act("Resume", "resume"), act("Cancel", "cancel", { mode: "now" }));
  if (["failed", "cancelled"].includes(job.status)) buttons.push(act("Retry", "retry"));
  return buttons;
}

async function perform(label, action, body) {
  if (action === "cancel" && !confirm("Cancel this job?")) return;
  try {
    await postJson(`/jobs/${state.job.id}/${action}`, body);
    showNotice("");
  } catch (error) {
    showNotice(`${label}: ${error.message}`);
  }
  refreshJob();
  if (!state.streaming) listen();
}

function showFacts() {
  const { run, job } = state;
  if (!run) return;
  const spec = run.spec || {};
  const parts = [spec.algorithm?.toUpperCase(), modelName(spec.model), spec.dataset,
    job && `attempt ${job.attempt}`, job && took(job) !== null && `took ${duration(took(job))}`, `created ${when(run.created_at)}`];
  byId("facts").textContent = parts.filter(Boolean).join("  ·  ");
  byId("crumb").textContent = shortId(run.id);
}

function showProgress() {
  const { job, progress } = state;
  const active = job && !job.is_terminal && progress;
  byId("progress").hidden = !active;
  if (!active) return;
  const data = { ...(progress.data || {}), ...progress };
  const facts = [
    [progress.phase, `${progress.done} / ${progress.total}`],
    ["reward", data.reward], ["entropy", data.entropy], ["tokens/s", data.tokens_per_second],
  ].filter(([, v]) => v !== undefined && v !== null);
  byId("progress").replaceChildren(progressBar(progress),
    el("dl", { class: "inline-facts" }, facts.map(([name, v]) => el("div", {}, el("dt", {}, name), el("dd", { class: "mono" }, typeof v === "string" ? v : number(v)))),
      data.eta_seconds != null ? el("div", {}, el("dt", {}, "left"), el("dd", { class: "mono" }, duration(data.eta_seconds))) : null));
}

function showTiles() {
  const result = state.run.result || {};
  const tiles = [];
  const interval = (v) => (v.low !== undefined && v.low !== null ? v : null);
  for (const [key, label, show] of [["acc", "Acc", percent], ["fmt", "Fmt", percent], ["mean_length", "Mean length", number]]) {
    const v = result[key];
    if (v) tiles.push([label, show(v.value ?? v), interval(v) ? `95%: ${show(v.low)} – ${show(v.high)}` : ""]);
  }
  for (const [k, v] of Object.entries(result.pass_at || {})) if (k !== "1") tiles.push([`pass@${k}`, percent(v?.value ?? v), v?.low != null ? `95%: ${percent(v.low)} – ${percent(v.high)}` : ""]);
  if (tiles.length && result.num_problems) tiles.push(["Answers", `${result.num_problems} × ${result.num_samples}`, "problems × samples"]);
  byId("tiles").hidden = !tiles.length;
  byId("tiles").replaceChildren(...tiles.map(([label, value, note]) =>
    el("div", { class: "tile" }, el("span", { class: "tile-label" }, label), el("span", { class: "tile-value" }, value), el("span", { class: "muted small" }, note))));
}

function flat(value, prefix = "") {
  return Object.entries(value || {}).flatMap(([key, v]) =>
    v && typeof v === "object" && !Array.isArray(v) ? flat(v, `${prefix}${key}.`) : [[prefix + key, v]]);
}

function showConfig(listId, sectionId, value) {
  const rows = flat(value);
  byId(sectionId).hidden = !rows.length;
  const wanted = byId("config-filter").value.trim().toLowerCase();
  const shown = listId === "config" && wanted ? rows.filter(([k, v]) => `${k} ${JSON.stringify(v)}`.toLowerCase().includes(wanted)) : rows;
  byId(listId).replaceChildren(...shown.flatMap(([key, v]) => [el("dt", {}, key),
    el("dd", { class: v === null ? "mono muted" : "mono" }, typeof v === "string" ? v : JSON.stringify(v))]));
}

function tell(event) {
  if (["progress", "metric.batch", "log.line", "completion.batch", "trace.batch"].includes(event.type)) return;
  const data = event.data || {};
  const text = data.from && data.to ? `${data.from} → ${event.message || data.to}` : event.message || data.message || "";
  const item = el("li", { class: `level-${event.level || "info"}` },
    el("time", { class: "muted mono small", datetime: event.created_at }, when(event.created_at)),
    el("span", { class: "small" }, el("span", { class: "event-type" }, event.type), ` ${text}`));
  byId("events").prepend(item);
  while (byId("events").childElementCount > 200) byId("events").lastElementChild.remove();
}

function listen() {
  state.streaming = true;
  byId("events").replaceChildren();
  const on = (work) => (event) => { tell(event); work?.(event); };
  follow(state.run.job_id, {
    "job.status": on(() => { refreshJob(); refreshRun(); }),
    progress: (event) => { state.progress = event.data; showProgress(); },
    "metric.batch": refreshCharts,
    "completion.batch": refreshCompletions,
    "trace.batch": refreshTraces,
    "checkpoint.created": on(refreshCheckpoints),
    "run.rewound": on(() => { refreshCharts(); refreshCompletions(); refreshTraces(); }),
    warning: on(),
  }, () => {
    state.streaming = false;
    [refreshRun, refreshJob, refreshCharts, refreshCompletions, refreshTraces, refreshCheckpoints].forEach((work) => work());
  });
}

async function start() {
  try {
    state.run = await getJson(`/runs/${runId}`);
  } catch (error) {
    byId("name").textContent = error.status === 404 ? "No such run" : "Run";
    showNotice(error.message);
    return;
  }
  byId("config-filter").addEventListener("input", () => showConfig("config", "config-section", state.run.spec));
  for (const work of [refreshRun, refreshJob, refreshCharts, refreshCompletions, refreshTraces, refreshCheckpoints]) work();
  if (state.run.job_id) listen();
}

start();
