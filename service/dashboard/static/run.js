// The page of one run: follows the job's events and shows what has been recorded.
import { follow, getJson, query, showNotice } from "./api.js";
import { showFields, showJobHead, showJobProgress, throttled } from "./job_head.js";
import { Charts } from "./run_charts.js";
import { Completions } from "./run_completions.js";
import { byId, duration, el, modelName, number, percent, shortId, took, when } from "./dom.js";

const runId = document.body.dataset.runId;
const state = { run: null, job: null, progress: null, streaming: false };
const charts = new Charts(runId);
const completions = new Completions(runId);

const refreshRun = throttled(async () => {
  state.run = await getJson(`/runs/${runId}`);
  showFacts();
  showTiles();
  showConfig();
  showFields("resolved", "resolved-section", state.run.resolved);
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
  const shown = { entropy: "Open the heat map", perturbation: "Open the figure", branch: "Open the tree" }[job.kind];
  const more = shown ? [el("a", { class: "button main", href: `/analyze/${job.kind}/${runId}` }, shown)] : [];
  showJobHead(job, more, () => { refreshJob(); if (!state.streaming) listen(); });
  showFacts();
}

function showProgress() {
  const data = { ...(state.progress?.data || {}), ...state.progress };
  showJobProgress(state.job, state.progress && data, [["reward", data.reward], ["entropy", data.entropy], ["tokens/s", data.tokens_per_second], ["answers sampled", data.sampled_answers]]);
}

function showConfig() {
  showFields("config", "config-section", state.run.spec, byId("config-filter").value.trim().toLowerCase());
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
    "checkpoint.removed": on(refreshCheckpoints),
    "checkpoint.damaged": on(refreshCheckpoints),
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
  byId("config-filter").addEventListener("input", showConfig);
  for (const work of [refreshRun, refreshJob, refreshCharts, refreshCompletions, refreshTraces, refreshCheckpoints]) work();
  if (state.run.job_id) listen();
}

start();
