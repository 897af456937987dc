// Several evaluations against the first of each benchmark, problem by problem.
import { getJson, query, showNotice } from "./api.js";
import { byId, clip, el, modelName, number, percent, shortId, visible, when } from "./dom.js";
import { drawInterval, points, span } from "./interval.js";
import { allProblems } from "./problems.js";
import { shareBar } from "./shares.js";

const chosen = new URLSearchParams(location.search).getAll("evaluation");
const MOST = 60;

const pairs = (ids) => ids.map((id) => `evaluation=${encodeURIComponent(id)}`).join("&");

async function show() {
  if (chosen.length < 2) {
    byId("facts").textContent = "Choose at least two evaluations of the same problems; the first of each benchmark is the baseline.";
    byId("picker-box").open = true;
    return;
  }
  try {
    const body = await getJson(`/evaluations/compare?${pairs(chosen)}`);
    byId("facts").textContent = `Paired by problem; the first of each benchmark is the baseline. p-values are exact and two-sided, adjusted by Holm over ${body.num_tests} ${body.num_tests === 1 ? "test" : "tests"}.`;
    byId("benchmarks").replaceChildren(...body.benchmarks.map(benchmark));
    byId("reports").hidden = false;
    const link = (format) => [" ", el("a", { href: `/evaluations/report?${pairs(chosen)}&format=${format}&paper=true` }, format)];
    byId("reports").replaceChildren("As a table: ", ...["markdown", "csv", "latex", "json"].flatMap(link));
  } catch (error) {
    showNotice(error.problem?.errors?.[0]?.mend ? `${error.message}: ${error.problem.errors[0].mend}` : error.message);
    byId("picker-box").open = true;
  }
}

function benchmark(found) {
  const byRun = new Map(found.evaluations.map((one) => [one.id, one]));
  const reach = Math.max(0.02, ...found.comparisons.flatMap((row) => [Math.abs(row.acc.low), Math.abs(row.acc.high)]));
  const rows = found.evaluations.map((one) => modelRow(one, found.comparisons.find((row) => row.evaluation === one.id), found.num_problems, reach));
  const head = ["Model", "Acc", "", "Fmt", "Difference in Acc, points", "", "Problems better / equal / worse", "p", "p adjusted"];
  return el("section", { class: "benchmark" },
    el("div", { class: "section-head" }, el("h2", {}, found.benchmark), el("span", { class: "muted" }, `${found.num_problems} problems × ${found.num_samples} samples`)),
    el("div", { class: "panel flush scroll" }, el("table", { class: "grid" },
      el("thead", {}, el("tr", {}, head.map((text, i) => el("th", { scope: "col", class: [1, 3, 4, 7, 8].includes(i) ? "num" : null }, text)))), el("tbody", {}, rows))),
    ...found.comparisons.map((row) => apart(found, row, byRun)));
}

function modelRow(one, row, count, reach) {
  const cells = [
    el("th", { scope: "row" }, el("a", { href: `/evaluations/${one.id}` }, one.model), el("div", { class: "muted small" }, row ? shortId(one.id) : `${shortId(one.id)} · baseline`)),
    el("td", { class: "num strong" }, percent(one.acc.value)), el("td", { class: "interval-cell" }, drawInterval(one.acc, { label: `Acc ${span(one.acc)}` })),
    el("td", { class: "num" }, percent(one.fmt.value)),
  ];
  if (!row) return el("tr", {}, cells, el("td", { colspan: 5 }));
  const p = row.problems;
  return el("tr", {}, cells,
    el("td", { class: "num strong" }, points(row.acc.value), el("div", { class: "muted small" }, span(row.acc, points, " to "))),
    el("td", { class: "interval-cell" }, drawInterval(row.acc, { from: -reach, to: reach, zero: 0, label: `difference ${points(row.acc.value)}, ${span(row.acc, points, " to ")}` })),
    el("td", {}, shareBar([["better", p.better / count, "good"], ["equal", p.equal / count, "quiet"], ["worse", p.worse / count, "bad"]]), el("span", { class: "mono small" }, `${p.better} / ${p.equal} / ${p.worse}`)),
    el("td", { class: "num", title: row.test.replaceAll("_", " ") }, number(row.p_value, 2)), el("td", { class: "num strong" }, number(row.p_adjusted, 2)));
}

function apart(found, row, byRun) {
  const name = `Problems on which ${byRun.get(row.evaluation).model} and ${byRun.get(row.baseline).model} differ`;
  const body = el("tbody");
  const box = el("details", { class: "differing" }, el("summary", {}, name, el("span", { class: "muted" }, `  ${row.problems.better + row.problems.worse}`)),
    el("div", { class: "panel flush scroll" }, el("table", { class: "grid" }, el("thead", {}, el("tr", {}, ["Problem", "Gold", "Baseline right", "This right", "Change"].map((text, i) => el("th", { scope: "col", class: i > 1 ? "num" : null }, text)))), body)));
  box.addEventListener("toggle", async () => {
    if (!box.open || body.rows.length) return;
    const [before, after] = await Promise.all([allProblems(row.baseline), allProblems(row.evaluation)]);
    const byId_ = new Map(before.map((problem) => [problem.prompt_id, problem]));
    const changes = after.map((problem) => [problem, byId_.get(problem.prompt_id)]).filter(([a, b]) => b && a.num_right !== b.num_right)
      .sort(([a, b], [c, d]) => Math.abs(c.num_right - d.num_right) - Math.abs(a.num_right - b.num_right));
    body.replaceChildren(...changes.slice(0, MOST).map(([a, b]) => el("tr", {},
      el("td", {}, el("a", { href: `/evaluations/${row.evaluation}#${encodeURIComponent(a.prompt_id)}` }, visible(clip(a.prompt.replace(/\s+/g, " "), 120)))),
      el("td", { class: "mono clipped" }, visible(a.gold ?? "")), el("td", { class: "num" }, `${b.num_right} / ${b.num_samples}`), el("td", { class: "num" }, `${a.num_right} / ${a.num_samples}`),
      el("td", { class: `num ${a.num_right > b.num_right ? "good" : "bad"}` }, `${a.num_right > b.num_right ? "+" : "−"}${Math.abs(a.num_right - b.num_right)}`))));
  });
  return box;
}

async function pick() {
  const page = await getJson(`/runs${query({ kind: "evaluate", limit: 200 })}`);
  const runs = page.data.filter((run) => run.result);
  byId("picker-empty").hidden = runs.length > 0;
  byId("picker").tBodies[0].replaceChildren(...runs.map((run) => el("tr", {},
    el("td", {}, el("input", { type: "checkbox", value: run.id, checked: chosen.includes(run.id), "aria-label": `Choose ${run.id}` })),
    el("td", {}, el("a", { href: `/evaluations/${run.id}` }, modelName(run.spec.model)), el("div", { class: "muted small mono" }, shortId(run.id))),
    el("td", {}, `${run.spec.dataset} × ${run.spec.num_samples}`),
    el("td", { class: "num" }, percent(run.result.acc?.value)), el("td", { class: "num muted" }, when(run.created_at)))));
}

byId("compare").addEventListener("click", () => {
  const boxes = [...document.querySelectorAll("#picker input:checked")].map((box) => box.value);
  // Those that were compared before stay in their order, so that the baseline stays the same.
  const ids = [...chosen.filter((id) => boxes.includes(id)), ...boxes.filter((id) => !chosen.includes(id)).reverse()];
  location.search = pairs(ids);
});
show();
pick().catch((error) => showNotice(error.message));
