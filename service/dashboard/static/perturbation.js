// A perturbation: accuracy by arm, the contrasts with effects before tests, and some of the edits.
import { save, watch } from "./analysis_page.js";
import { ARMS, armsFigure, pngAddress, svgAddress } from "./arms_figure.js";
import { byId, el, number, percent, visible } from "./dom.js";

const { runId } = document.body.dataset;
const points = (value) => `${value > 0 ? "+" : value < 0 ? "−" : ""}${Math.abs(100 * value).toFixed(1)}`;
const interval = (low, high) => `${points(low)} to ${points(high)}`;
const POLICIES = { uniform_vocab: "any token", on_policy_alt: "an alternative drawn from the model", second_best: "the likeliest other token", surprisal_matched: "tokens of like surprisal", truncate: "nothing: cut before it" };

const facts = (spec) => [spec.dataset, spec.mode === "edit_all" ? "all tokens of an arm replaced" : "one token replaced, the rest written anew", `by ${POLICIES[spec.policy]}`, `top and bottom ${100 * spec.fraction}%`, `${spec.num_continuations} continuations`];

const quoted = (text) => (text === null ? "(cut here)" : `“${visible(text).replace(/ /g, "␣").replace(/\n/g, "↵")}”`);
const cell = (text, kind = "num mono") => el("td", { class: kind }, text);

function show({ result, spec }) {
  const style = getComputedStyle(document.documentElement);
  byId("figure").replaceChildren(armsFigure(result, { ink: style.getPropertyValue("--ink"), rule: style.getPropertyValue("--hair") }));
  byId("counts").textContent = `${result.num_tried} problems tried, ${result.num_solved} solved in at least ${percent(spec.min_solved)} of ${spec.num_attempts} attempts` +
    (result.num_too_short ? `, ${result.num_too_short} answers too short to disturb` : "") + `; ${result.num_problems} compared, ${result.num_outcomes} continuations. Nothing from the box of an answer on is touched.`;
  byId("contrasts").tBodies[0].replaceChildren(...result.contrasts.map(contrast));
  byId("arms").tBodies[0].replaceChildren(...Object.entries(result.arms).map(([arm, a]) => el("tr", {},
    el("th", { scope: "row" }, ARMS[arm].join(", ")), cell(percent(a.accuracy.value)), cell(`${percent(a.accuracy.low)} – ${percent(a.accuracy.high)}`),
    cell(percent(a.truncated)), cell(percent(a.unparsable)), cell(number(a.mean_entropy)), cell(percent(a.mean_progress)), cell(number(a.mean_surprisal)))));
  byId("examples").tBodies[0].replaceChildren(...(result.examples || []).map((one) => el("tr", {},
    cell(String(one.group)), el("td", {}, ARMS[one.arm].join(", ")),
    el("td", { class: "mono" }, one.edits.map((edit) => `${quoted(edit.token)} → ${quoted(edit.replacement)}`).join(", ")),
    cell(one.edits.map((edit) => number(edit.entropy)).join(", ")), cell(`${one.right} / ${one.num_outcomes}`))));
}

function contrast(c) {
  const detectable = c.minimum_detectable === null ? "none: too few problems" : points(c.minimum_detectable);
  return el("tr", {}, el("th", { scope: "row" }, `${ARMS[c.first].join(", ")} − ${ARMS[c.second].join(", ")}`, c.primary ? el("span", { class: "tag" }, "primary") : null),
    cell(points(c.difference), "num mono strong"), cell(interval(c.low, c.high)), cell(detectable), cell(number(c.p_holm, 2)), cell(number(c.p_value, 2)),
    el("td", { class: "small muted" }, c.test === "mcnemar_exact" ? `McNemar, exact: ${c.table[0][1]} against ${c.table[1][0]}` : "sign flips"));
}

watch("perturbation", facts, (run) => {
  show(run);
  byId("save-svg").onclick = () => save(`${runId}.svg`, svgAddress(run.result));
  byId("save-png").onclick = async () => save(`${runId}.png`, await pngAddress(run.result));
  byId("save-json").onclick = () => save(`${runId}.json`, `data:application/json;charset=utf-8,${encodeURIComponent(JSON.stringify(run.result, null, 1))}`);
  byId("traces").href = `/runs/${runId}/traces/0`;
});
