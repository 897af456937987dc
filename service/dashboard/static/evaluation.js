// The page of one evaluation: its numbers, and every problem and answer behind them.
import { follow, getJson, showNotice } from "./api.js";
import { byId, duration, el, modelName, number, percent, shortId, took, when } from "./dom.js";
import { drawInterval, span } from "./interval.js";
import { showFields, showJobHead, showJobProgress, throttled } from "./job_head.js";
import { Problems } from "./problems.js";
import { shareBar, shareLegend } from "./shares.js";

const runId = document.body.dataset.runId;
const state = { run: null, job: null, progress: null, streaming: false };
const problems = new Problems(runId);
const TONES = { right: "good", wrong: "bad", unparsable: "quiet", timeout: "warn", crashed: "warn" };

const refreshRun = throttled(async () => {
  state.run = await getJson(`/evaluations/${runId}`);
  showFacts();
  showResult(state.run.result);
  showRequest();
  const { identity, ...resolved } = state.run.resolved || {};
  byId("digest").textContent = identity?.digest || "";
  showFields("identity", "identity-section", identity?.parts);
  showFields("resolved", "resolved-section", resolved);
});
const refreshJob = throttled(async () => {
  state.job = await getJson(`/jobs/${state.run.job_id}`);
  state.progress = state.job.progress || state.progress;
  const ids = [runId, ...state.job.run_ids.filter((id) => id !== runId)];
  const compare = el("a", { class: "button", href: `/evaluations/compare?${ids.map((id) => `evaluation=${id}`).join("&")}` }, "Compare…");
  showJobHead(state.job, [compare], () => { refreshJob(); if (!state.streaming) listen(); });
  showProgress();
  showFacts();
});
const refreshProblems = throttled(() => problems.refresh(), 4000);

function showProgress() {
  const progress = state.progress;
  const acc = progress?.run_id === runId ? percent(progress.acc) : undefined; // the job may be at another of its runs
  showJobProgress(state.job, progress, progress ? [["accuracy so far", acc], ["tokens/s", progress.tokens_per_second]] : []);
}

function showFacts() {
  const { run, job } = state, spec = run.spec;
  const sampling = spec.sampling || {};
  const parts = [modelName(spec.model), spec.dataset, `${spec.num_samples} samples, temperature ${sampling.temperature}, top-p ${sampling.top_p}, up to ${sampling.max_completion_length} tokens`,
    job && job.attempt > 1 && `attempt ${job.attempt}`, job && took(job) !== null && `took ${duration(took(job))}`, `created ${when(run.created_at)}`];
  byId("facts").textContent = parts.filter(Boolean).join("  ·  ");
  byId("crumb").textContent = shortId(run.id);
}

const showRequest = () => showFields("config", "config-section", state.run.spec, byId("config-filter").value.trim().toLowerCase());

function showResult(result) {
  for (const id of ["tiles", "numbers-section", "verdicts-section"]) byId(id).hidden = !result;
  if (!result) return;
  const tiles = [
    ["Acc", percent(result.acc.value), span(result.acc)], ["Fmt", percent(result.fmt.value), span(result.fmt)],
    ["Cut at the limit", percent(result.truncated), "share of answers"],
    ["Length", number(result.mean_length.value), `tokens, median ${number(result.median_length)}`],
    ["Answers", number(result.num_answers), `${result.num_problems} problems × ${result.num_samples}`],
  ];
  byId("tiles").replaceChildren(...tiles.map(([label, value, note]) =>
    el("div", { class: "tile" }, el("span", { class: "tile-label" }, label), el("span", { class: "tile-value" }, value), el("span", { class: "muted small" }, note))));
  byId("numbers").tBodies[0].replaceChildren(...numbers(result));
  showReports([runId]);
  const verdicts = Object.entries(result.verdicts).map(([name, share]) => [name, share, TONES[name] || "quiet"]);
  byId("verdicts").replaceChildren(shareBar(verdicts), shareLegend(verdicts));
}

function numbers(result) {
  const rows = [["Acc", result.acc], ["Fmt", result.fmt]];
  for (const [k, v] of Object.entries(result.pass_at)) if (k !== "1") rows.push([`pass@${k}`, v]);
  for (const [k, v] of Object.entries(result.maj_at)) if (k !== "1") rows.push([`maj@${k}`, v]);
  for (const [field, groups] of Object.entries(result.by || {})) {
    for (const [label, v] of Object.entries(groups)) rows.push([`Acc, ${field} ${label}`, v.acc, `${v.num_problems} problems`]);
  }
  return rows.map(([name, v, note]) => el("tr", {},
    el("th", { scope: "row" }, name, note ? el("span", { class: "muted small" }, `  ${note}`) : null),
    el("td", { class: "num strong" }, percent(v.value)), el("td", { class: "num muted" }, span(v)),
    el("td", { class: "interval-cell" }, drawInterval(v, { label: `${name} ${percent(v.value)}, ${span(v)}` }))));
}

function showReports(ids) {
  const base = ids.map((id) => `evaluation=${id}`).join("&");
  const link = (format) => [" ", el("a", { href: `/evaluations/report?${base}&format=${format}&paper=true` }, format)];
  byId("reports").replaceChildren("As a table: ", ...["markdown", "csv", "latex", "json"].flatMap(link));
}

function listen() {
  state.streaming = true;
  follow(state.run.job_id, {
    "job.status": () => { refreshJob(); refreshRun(); },
    progress: (event) => { state.progress = event.data; showProgress(); },
    "completion.batch": refreshProblems,
  }, () => {
    state.streaming = false;
    [refreshRun, refreshJob, refreshProblems].forEach((work) => work());
  });
}

async function start() {
  try {
    state.run = await getJson(`/evaluations/${runId}`);
  } catch (error) {
    byId("name").textContent = error.status === 404 ? "No such evaluation" : "Evaluation";
    showNotice(error.message);
    return;
  }
  byId("config-filter").addEventListener("input", showRequest);
  for (const work of [refreshRun, refreshJob, refreshProblems]) work();
  listen();
}

start();
