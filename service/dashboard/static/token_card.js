// What is known of one token: every channel, and what else it could have been.
import { CHANNELS } from "./colour.js";
import { el, number, percent, visible } from "./dom.js";

const quoted = (text) => (text === "" ? "" : `“${visible(text).replace(/ /g, "␣").replace(/\n/g, "↵")}”`);

// `scale` is the run's progress_scale: progress is scale × (log p − reference log p).
export function showCard(card, data, position, scale = 1) {
  const index = position;
  const pivot = data.pivots.find((p) => p.position === position + (data.start || 0));
  const channels = data.channels;
  const rows = Object.keys(CHANNELS).filter((name) => channels[name]).map((name) =>
    el("div", {}, el("dt", { title: CHANNELS[name].about }, CHANNELS[name].label), el("dd", { class: "mono" }, number(channels[name][index]), el("span", { class: "muted" }, CHANNELS[name].unit ? ` ${CHANNELS[name].unit}` : ""))));
  if (channels.logp) {
    const p = channels.logp[index];
    rows.splice(2, 0, el("div", {}, el("dt", {}, "Probability"), el("dd", { class: "mono" }, p === null ? "–" : percent(Math.exp(p)))));
    if (channels.progress) {
      const s = channels.progress[index];
      if (p !== null && s !== null) rows.splice(3, 0, el("div", {}, el("dt", { title: "log p − progress / progress_scale" }, "Reference log-prob"), el("dd", { class: "mono" }, number(p - s / scale), el("span", { class: "muted" }, " nats"))));
    }
  }
  card.replaceChildren(
    el("h2", { class: "card-token mono" }, quoted(shownText(data.tokens, index)), data.tokens[index] === "" ? el("span", { class: "tag" }, "a part of it") : null),
    el("p", { class: "muted small" }, `position ${position + (data.start || 0)} of 0–${data.tokens.length - 1}  ·  id ${data.token_ids?.[index] ?? "–"}`, pivot ? el("span", { class: "tag hot" }, "▲ pivot") : null),
    el("dl", { class: "values" }, rows),
    alternatives(pivot, data, index));
}

// A token without text of its own is a part of the character before it.
function shownText(tokens, index) {
  let at = index;
  while (at > 0 && tokens[at] === "") at -= 1;
  return tokens[at];
}

function alternatives(pivot, data, index) {
  const found = pivot?.alternatives || [];
  if (!found.length) return pivot ? null : el("p", { class: "muted small" }, "Alternatives are stored at pivots.");
  const written = data.token_ids?.[index];
  return el("section", {}, el("h3", {}, "It could have been"), el("ol", { class: "plain alternatives" }, found.map((other) => {
    const share = Math.exp(other.logp);
    const bar = el("span", { class: "alt-bar" });
    bar.style.width = `${(100 * share).toFixed(1)}%`;
    const isWritten = written === undefined ? other.token === data.tokens[index] : other.token_id === written;
    return el("li", { class: isWritten ? "is-written" : null },
      el("span", { class: "mono alt-token" }, quoted(other.token) || "(part of a character)"), el("span", { class: "alt-track" }, bar), el("span", { class: "mono num" }, percent(share)));
  })));
}
