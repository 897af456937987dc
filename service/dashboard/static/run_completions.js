// Sampled answers of a step (training) or all answers (evaluation).
import { getJson, query } from "./api.js";
import { byId, el, number, verdictMark, visible } from "./dom.js";

const LIMIT = 64;

export class Completions {
  constructor(runId) {
    this.runId = runId;
    this.chosen = null;
    byId("step").addEventListener("change", () => {
      this.chosen = byId("step").value === "latest" ? null : Number(byId("step").value);
      this.refresh(this.run);
    });
  }

  async refresh(run) {
    this.run = run;
    if (run.kind === "entropy") return;
    const evaluation = run.kind === "evaluate";
    if (!evaluation) this.steps(run);
    byId("step").parentElement.hidden = evaluation;
    const step = evaluation ? undefined : (this.chosen ?? this.latest);
    const path = evaluation ? `/evaluations/${this.runId}/items` : `/runs/${this.runId}/completions`;
    const page = await getJson(path + query({ step, limit: LIMIT }));
    byId("completions-section").hidden = !page.data.length;
    byId("completions-title").textContent = evaluation ? "Answers" : "Sampled answers";
    const named = [...new Set(page.data.flatMap((row) => Object.keys(row.rewards || {})))];
    const head = ["", "Problem", "Answer", "Gold", "Tokens", ...(evaluation ? [] : ["Reward", "Advantage"])];
    byId("completions").tHead.replaceChildren(el("tr", {}, head.map((text, i) => el("th", { scope: "col", class: i > 3 ? "num" : null }, text))));
    byId("completions").tBodies[0].replaceChildren(...page.data.map((row) => this.row(row, evaluation, named)));
  }

  steps(run) {
    const reward = run.summary?.reward || Object.values(run.summary || {})[0];
    this.latest = undefined;
    const count = reward?.last_step ?? reward?.steps ?? 0;
    const select = byId("step");
    if (select.options.length === count + 1) return;
    const options = [el("option", { value: "latest" }, "latest")];
    for (let step = count; step >= 1 && options.length < 500; step -= 1) options.push(el("option", { value: step }, String(step)));
    select.replaceChildren(...options);
    select.value = this.chosen ?? "latest";
  }

  row(row, evaluation, named) {
    const verdict = row.verdict || (row.rewards?.accuracy > 0 ? "right" : "wrong");
    const extra = Object.entries(row.extra || {}).map(([name, value]) => `${name} ${value}`);
    const told = [...named.map((name) => `${name} ${number(row.rewards?.[name])}`), ...extra].join(", ");
    return el("tr", {},
      el("td", { class: "mark" }, verdictMark(verdict)),
      el("td", { class: "clipped", title: row.prompt }, lastLine(row.problem || row.prompt || row.prompt_id)),
      el("td", { class: "answer" }, visible(row.completion || ""), row.truncated ? el("span", { class: "tag" }, "cut") : null),
      el("td", { class: "mono clipped" }, row.gold ?? ""),
      el("td", { class: "num" }, number(row.num_tokens)),
      ...(evaluation ? [] : [el("td", { class: "num", title: told }, number(row.reward)), el("td", { class: "num" }, number(row.advantage))]));
  }
}

// The question itself: the last turn of the prompt, without the marks of a chat template.
function lastLine(prompt) {
  const turns = prompt.split(/<\|im_start\|>|<\|im_end\|>/).map((t) => t.replace(/^(user|assistant|system)\n/, "").trim()).filter((t) => t && t !== "assistant");
  return turns[turns.length - 1] || prompt;
}
