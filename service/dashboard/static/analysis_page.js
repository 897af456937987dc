// What the pages of a perturbation and of a branch have in common: they wait for their job, then show its result.
import { getJson, showNotice } from "./api.js";
import { byId, el, modelName, shortId } from "./dom.js";
import { showJobHead, showJobProgress, throttled } from "./job_head.js";

// `facts` of the request stand below the title; `show` draws a run that has a result.
export function watch(kind, facts, show) {
  const { runId } = document.body.dataset;
  let timer = null;
  const look = throttled(async () => {
    const run = await getJson(`/analyze/${kind}/${runId}`);
    const { job, result, spec } = run, progress = job.progress || {};
    showJobHead(job, [], look);
    showJobProgress(job, job.progress, [["problems tried", progress.num_tried], ["of them solved", progress.num_solved]]);
    byId("facts").textContent = [modelName(spec.model), ...facts(spec)].filter(Boolean).join("  ·  ");
    byId("result").hidden = !result;
    if (result) show(run);
    showNotice("");
    clearTimeout(timer);
    if (!job.is_terminal) timer = setTimeout(look, 1500);
  });
  byId("crumb").textContent = shortId(runId);
  look();
}

// Hand a text or a data: URL to the reader as a file.
export function save(name, href) {
  el("a", { href, download: name }).click();
}
