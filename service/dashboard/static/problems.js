// The problems of an evaluation, each opened to its answers on demand.
import { getJson, query, showNotice } from "./api.js";
import { byId, clip, el, number, verdictMark, visible } from "./dom.js";
import { shareBar } from "./shares.js";

const PAGE = 200, SHOWN = 100, MAX_PROBLEMS = 10000;
const ORDERS = {
  file: (a, b) => a.group - b.group,
  hard: (a, b) => a.num_right - b.num_right || a.group - b.group,
  easy: (a, b) => b.num_right - a.num_right || a.group - b.group,
  long: (a, b) => b.mean_length - a.mean_length || a.group - b.group,
};

export async function allProblems(runId) {
  const rows = [];
  let cursor = null;
  do {
    const page = await getJson(`/evaluations/${runId}/problems${query({ limit: PAGE, cursor })}`);
    rows.push(...page.data);
    cursor = page.next_cursor;
  } while (cursor && rows.length < MAX_PROBLEMS);
  return rows;
}

export class Problems {
  constructor(runId) {
    Object.assign(this, { runId, rows: [], shown: SHOWN, open: new Set() });
    const redraw = () => { this.shown = SHOWN; this.draw(); };
    byId("order").addEventListener("change", redraw);
    byId("filter").addEventListener("input", redraw);
    byId("more").addEventListener("click", () => { this.shown += SHOWN; this.draw(); });
  }

  async refresh() {
    this.rows = await allProblems(this.runId);
    byId("problems-section").hidden = !this.rows.length;
    this.draw();
    const wanted = decodeURIComponent(location.hash.slice(1));
    if (wanted && !this.arrived) {
      this.arrived = true;
      const button = [...document.querySelectorAll("#problems .problem-open")].find((node) => node.dataset.problem === wanted);
      button?.click();
      button?.scrollIntoView({ block: "center" });
    }
  }

  draw() {
    const wanted = byId("filter").value.trim().toLowerCase();
    const texts = (row) => [row.prompt_id, row.prompt, row.gold, row.subject, row.level].join("\n").toLowerCase();
    const found = this.rows.filter((row) => !wanted || texts(row).includes(wanted)).sort(ORDERS[byId("order").value]);
    const never = found.filter((row) => !row.num_right).length;
    byId("problems-count").textContent = `${found.length}, ${never} never solved, ${found.filter((row) => row.num_right === row.num_samples).length} always`;
    const withLabels = this.rows.some((row) => row.level || row.subject);
    byId("problems").classList.toggle("no-labels", !withLabels);
    byId("problems").tBodies[0].replaceChildren(...found.slice(0, this.shown).flatMap((row) => this.pair(row)));
    byId("more").hidden = found.length <= this.shown;
  }

  pair(row) {
    const detail = el("tr", { class: "problem-detail", hidden: !this.open.has(row.prompt_id) }, el("td", { colspan: 7 }));
    const toggle = el("button", { type: "button", class: "problem-open", dataset: { problem: row.prompt_id }, "aria-expanded": String(!detail.hidden), onclick: () => this.toggle(row, detail, toggle) },
      visible(clip(row.prompt.replace(/\s+/g, " "), 150)));
    if (!detail.hidden) this.fill(row, detail);
    const bar = shareBar([["right", row.num_right / row.num_samples, "good"], ["boxed, not right", Math.max(0, row.num_boxed - row.num_right) / row.num_samples, "bad"], ["no box", (row.num_samples - Math.max(row.num_boxed, row.num_right)) / row.num_samples, "quiet"]]);
    return [el("tr", {},
      el("td", {}, toggle, el("div", { class: "muted small mono" }, row.prompt_id)),
      el("td", { class: "mono clipped gold" }, visible(row.gold ?? "")),
      el("td", { class: "small" }, [row.level && `Level ${row.level}`, row.subject].filter(Boolean).join(" · ")),
      el("td", { class: "num" }, `${row.num_right} / ${row.num_samples}`, bar),
      el("td", { class: "num" }, number(row.num_boxed)), el("td", { class: "num" }, number(row.num_truncated)), el("td", { class: "num" }, number(row.mean_length))), detail];
  }

  toggle(row, detail, button) {
    detail.hidden = !detail.hidden;
    button.setAttribute("aria-expanded", String(!detail.hidden));
    if (detail.hidden) return this.open.delete(row.prompt_id);
    this.open.add(row.prompt_id);
    return this.fill(row, detail);
  }

  async fill(row, detail) {
    const cell = detail.cells[0];
    try {
      const page = await getJson(`/evaluations/${this.runId}/items${query({ prompt_id: row.prompt_id, limit: PAGE })}`);
      const answers = page.data.sort((a, b) => a.sample - b.sample);
      cell.replaceChildren(el("div", { class: "prompt-text" }, visible(row.prompt)), el("p", { class: "small" }, el("span", { class: "muted" }, "Gold "), el("span", { class: "mono" }, visible(row.gold ?? "–"))),
        ...answers.map(answerBox));
    } catch (error) {
      showNotice(error.message);
    }
  }
}

function answerBox(answer) {
  const verdict = answer.verdict || "?";
  return el("details", { class: "answer-box" },
    el("summary", {}, verdictMark(verdict), ` ${verdict} `,
      answer.truncated ? el("span", { class: "tag" }, "cut") : null,
      el("span", { class: "muted small" }, ` sample ${answer.sample} · ${number(answer.num_tokens)} tokens · …${visible(answer.completion.trim().replace(/\s+/g, " ").slice(-90))}`)),
    el("div", { class: "answer-text" }, visible(answer.completion)));
}
