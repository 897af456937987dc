// What the pages of a perturbation and of a branch have in common: they wait for their job, then show its result.
import { getJson, showNotice } from "./api.js";
import { byId, el, modelName, pill, progressBar, shortId } from "./dom.js";

export async function watch(kind, title, facts, show) {
  const { runId } = document.body.dataset;
  byId("crumb").textContent = shortId(runId);
  try {
    const run = await getJson(`/analyze/${kind}/${runId}`);
    const job = run.job;
    byId("name").textContent = job.name || title;
    byId("status").replaceChildren(pill(job.status, job.stalled));
    byId("facts").textContent = [modelName(run.spec.model), ...facts(run.spec)].filter(Boolean).join("  ·  ");
    byId("error").hidden = !job.error;
    if (job.error) byId("error").replaceChildren(el("strong", {}, job.error.code), el("p", {}, job.error.message || ""));
    const busy = !job.is_terminal && job.progress;
    byId("progress").hidden = !busy;
    if (busy) byId("progress").replaceChildren(progressBar(job.progress), el("span", { class: "muted small mono" }, `${job.progress.phase} ${job.progress.done}/${job.progress.total}`));
    byId("result").hidden = !run.result;
    if (run.result) show(run);
    if (!job.is_terminal) setTimeout(() => watch(kind, title, facts, show), 1500);
    showNotice("");
  } catch (error) {
    showNotice(error.message);
  }
}

// Hand a text or a data: URL to the reader as a file.
export function save(name, href) {
  el("a", { href, download: name }).click();
}
