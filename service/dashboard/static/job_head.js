// What the pages of single runs share: the line about the job, its buttons, its error, its configuration.
import { postJson, showNotice } from "./api.js";
import { byId, el, number, pill, progressBar, duration } from "./dom.js";

const NAMES = { train: "Training", evaluate: "Evaluation", entropy: "Entropy analysis", perturbation: "Perturbation", branch: "Branches" };

// Do the work at most once in `pause` ms, and once more after the last call.
export function throttled(work, pause = 1000) {
  let due = false, waiting = false;
  const turn = async () => {
    due = false;
    waiting = true;
    try { await work(); } catch (error) { if (error.status !== 404) showNotice(error.message); }
    setTimeout(() => { waiting = false; if (due) turn(); }, pause);
  };
  return () => { due = true; if (!waiting) turn(); };
}

// Name, status, buttons and error of a job; `after` is called once an action has been sent.
export function showJobHead(job, more, after) {
  byId("status").replaceChildren(pill(job.status, job.stalled));
  byId("name").textContent = job.name || NAMES[job.kind] || job.kind;
  document.title = `${job.status} · ${byId("name").textContent} · ERPO Lab`;
  byId("actions").replaceChildren(...more, ...actions(job, after));
  const trouble = byId("error");
  trouble.hidden = !job.error;
  if (job.error) {
    trouble.replaceChildren(el("strong", {}, job.error.code || "failed"), ` ${job.error.message || ""}`,
      job.error.log_tail ? el("pre", {}, job.error.log_tail) : "");
  }
}

function actions(job, after) {
  const act = (label, action, body) => el("button", { type: "button", class: action === "cancel" ? "button danger" : "button", onclick: () => perform(job, label, action, body, after) }, label);
  const buttons = [];
  if (["queued", "starting", "running"].includes(job.status)) {
    if (job.kind === "train") buttons.push(act("Pause", "pause"));
    buttons.push(act("Cancel", "cancel", { mode: "checkpoint" }));
  }
  if (job.status === "paused") buttons.push(act("Resume", "resume"), act("Cancel", "cancel", { mode: "now" }));
  if (["failed", "cancelled"].includes(job.status)) buttons.push(act("Retry", "retry"));
  return buttons;
}

async function perform(job, label, action, body, after) {
  if (action === "cancel" && !confirm("Cancel this job?")) return;
  try {
    await postJson(`/jobs/${job.id}/${action}`, body);
    showNotice("");
  } catch (error) {
    showNotice(`${label}: ${error.message}`);
  }
  after();
}

// How far an active job is; `measured` are pairs of a name and a number.
export function showJobProgress(job, progress, measured) {
  const active = job && !job.is_terminal && progress;
  byId("progress").hidden = !active;
  if (!active) return;
  const facts = [[progress.phase, `${progress.done} / ${progress.total}`], ...measured].filter(([, v]) => v !== undefined && v !== null);
  byId("progress").replaceChildren(progressBar(progress),
    el("dl", { class: "inline-facts" }, facts.map(([name, v]) => el("div", {}, el("dt", {}, name), el("dd", { class: "mono" }, typeof v === "string" ? v : number(v)))),
      progress.eta_seconds != null ? el("div", {}, el("dt", {}, "left"), el("dd", { class: "mono" }, duration(progress.eta_seconds))) : null));
}

function flat(value, prefix = "") {
  return Object.entries(value || {}).flatMap(([key, v]) =>
    v && typeof v === "object" && !Array.isArray(v) ? flat(v, `${prefix}${key}.`) : [[prefix + key, v]]);
}

// A nested object as a list of its leaves, those that hold the wanted text.
export function showFields(listId, sectionId, value, wanted = "") {
  const rows = flat(value);
  byId(sectionId).hidden = !rows.length;
  const shown = rows.filter(([k, v]) => `${k} ${JSON.stringify(v)}`.toLowerCase().includes(wanted));
  byId(listId).replaceChildren(...shown.flatMap(([key, v]) => [el("dt", {}, key),
    el("dd", { class: v === null ? "mono muted" : "mono" }, typeof v === "string" ? v : JSON.stringify(v))]));
}
