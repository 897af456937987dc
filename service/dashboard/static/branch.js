// What if it had said something else: the alternatives at one place as a tree, each with where it leads.
import { watch } from "./analysis_page.js";
import { byId, clip, el, number, percent, visible } from "./dom.js";

const quoted = (text) => (text === "" ? "(part of a character)" : `“${visible(text).replace(/ /g, "␣").replace(/\n/g, "↵")}”`);
const facts = (spec) => [`token ${spec.position}`, `${spec.num_continuations} continuations each`, spec.sampling.temperature === 0 ? "greedy" : `temperature ${spec.sampling.temperature}`];

function rateBar(rate) {
  const bar = el("span", { class: "rate-bar" }), band = el("span", { class: "rate-band" });
  bar.style.width = percent(rate.value);
  band.style.left = percent(rate.low);
  band.style.width = percent(rate.high - rate.low);
  return el("span", { class: "rate-track", role: "img", "aria-label": `${percent(rate.value)}, 95% interval ${percent(rate.low)} to ${percent(rate.high)}` }, bar, band);
}

function branch(one) {
  const rate = one.rate ? [rateBar(one.rate), el("span", { class: "mono" }, `${one.right} of ${one.num} right`), el("span", { class: "muted small mono" }, `${percent(one.rate.low)} – ${percent(one.rate.high)}`)]
    : [el("span", { class: "muted" }, `${one.num} continuations`)];
  const answers = one.answers.map(({ answer, count }) => el("li", {}, el("span", { class: "mono" }, answer === "" ? "no answer in a box" : clip(visible(answer), 60)), el("span", { class: "muted small mono" }, ` × ${count}`)));
  return el("li", { class: one.is_written ? "is-written" : null },
    el("div", { class: "branch-head" }, el("span", { class: "branch-token mono" }, quoted(one.token)), el("span", { class: "muted small mono branch-share" }, `p ${percent(Math.exp(one.logp))}`),
      ...rate, one.is_written ? el("span", { class: "tag" }, "written") : null, one.truncated ? el("span", { class: "muted small" }, `${one.truncated} cut at the length limit`) : null),
    el("ul", {}, answers),
    el("details", {}, el("summary", {}, "Continuations"), one.examples.map((text) => el("p", { class: "continuation mono small" }, visible(text)))));
}

watch("branch", facts, ({ result }) => {
  byId("prompt").textContent = visible(result.prompt);
  byId("prefix").textContent = visible(result.prefix) || "(the beginning of the answer)";
  byId("place").textContent = `entropy here ${number(result.entropy)} nats` + (result.gold ? `  ·  right answer ${result.gold}` : "  ·  no right answer is known: only what was answered is counted");
  byId("branches").replaceChildren(...result.branches.map(branch));
});
