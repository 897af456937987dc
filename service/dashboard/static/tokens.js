// The page of coloured tokens: an analysis, or the traces of a training run (the credit microscope).
import { getJson, query, showNotice } from "./api.js";
import { LineChart } from "./chart.js";
import { CHANNELS, css, colourAt, defaultTop, domainOf, paletteOf } from "./colour.js";
import { startBranch } from "./branching.js";
import { chooseOther, withDifference } from "./difference.js";
import { byId, clip, el, entropyText, modelName, number, pill, shortId, verdictMark, visible } from "./dom.js";
import { showCard } from "./token_card.js";
import { TokenView } from "./token_view.js";

const { runId, source, number: givenNumber } = document.body.dataset;
const analysis = source === "analysis";
const home = analysis ? `/analyze/entropy/${runId}` : `/runs/${runId}`;
const lists = analysis ? `${home}/sequences` : `${home}/traces`;
const ORDER = Object.keys(CHANNELS);
const state = { other: "", sequences: [], cursor: null, n: null, data: null, channel: "entropy", tops: {}, palette: localStorage.getItem("erpo-palette") || "heat" };

const view = new TokenView(byId("tokens"), { onPoint: pointed });
const curve = new LineChart(byId("curve"), {
  title: "Entropy", colour: "--line-2", height: 120, xName: "token",
  onHover: (index) => { if (index !== null) view.point(index); },
  onPick: (index) => { if (index !== null) view.focus(index); },
});

function pointed(position) {
  showCard(byId("card"), state.data, position, state.scale);
  curve.point(position);
}

// Where the page is, in its address, so that a link shows the same token.
function remember() {
  const values = new URLSearchParams({ n: state.n, c: state.channel });
  if (view.current !== null) values.set("t", view.current);
  if (state.other) values.set("vs", state.other);
  history.replaceState(null, "", `${location.pathname}#${values}`);
}

async function loadList(fresh = true) {
  const page = await getJson(lists + query({ limit: 100, cursor: fresh ? null : state.cursor }));
  state.sequences = fresh ? page.data : state.sequences.concat(page.data);
  state.cursor = page.next_cursor;
  byId("more").hidden = !page.has_more;
  showList();
}

const meanOf = ({ stats }) => stats?.h_mean ?? stats?.h_mean_low ?? 0;

function showList() {
  const top = Math.max(...state.sequences.map(meanOf), 1e-9);
  byId("sequences").replaceChildren(...state.sequences.map((sequence) => {
    const mean = entropyText(sequence.stats || {}, 2, "h_mean");
    const meter = el("span", { class: "pick-meter", title: `mean entropy: ${mean} nats` });
    meter.style.setProperty("--share", `${(100 * meanOf(sequence)) / top}%`);
    const facts = [analysis ? `#${sequence.n}` : `step ${sequence.step}`, `${sequence.num_tokens} tokens`, mean];
    if (sequence.reward !== null && sequence.reward !== undefined) facts.push(`r ${number(sequence.reward)}`);
    return el("li", {}, el("button", { type: "button", class: "pick", "aria-current": sequence.n === state.n ? "true" : null, onclick: () => choose(sequence.n) },
      el("span", { class: "pick-text" }, clip(visible(sequence.completion || "(empty)"), 90)),
      el("span", { class: "muted small mono" }, sequence.verdict ? [verdictMark(sequence.verdict), "  "] : null, facts.join("  ")), meter));
  }));
}

// The k3 estimator of the loss, exp(-d) - 1 + d with d = log p - reference log p = progress / progress_scale.
function addKl(channels, scale) {
  if (channels.progress) channels.kl = channels.progress.map((s) => (s === null ? null : Math.expm1(-s / scale) + s / scale));
}

async function choose(n, position = null) {
  try {
    const data = await getJson(`${lists}/${n}/tokens`);
    showNotice("");
    addKl(data.channels, state.scale);
    await withDifference(data, state.other).catch((error) => showNotice(error.message));
    Object.assign(state, { n, data });
  } catch (error) {
    showNotice(error.message);
    return;
  }
  const sequence = state.sequences.find((s) => s.n === n);
  byId("prompt-box").hidden = !sequence?.prompt;
  byId("prompt").textContent = visible(sequence?.prompt || "");
  if (!state.data.channels[state.channel]) state.channel = ORDER.find((name) => state.data.channels[name]);
  view.show(state.data);
  showChannels();
  recolour();
  showList();
  document.querySelector('.pick[aria-current="true"]')?.scrollIntoView({ block: "nearest" });
  if (position === null) byId("card").replaceChildren(el("p", { class: "muted" }, "Point at a token, or press an arrow key."));
  else view.focus(position);
  remember();
}

function showChannels() {
  const present = ORDER.filter((name) => state.data.channels[name]);
  byId("channels").replaceChildren(...present.map((name) =>
    el("button", { type: "button", title: CHANNELS[name].about, "aria-pressed": String(name === state.channel), onclick: () => { state.channel = name; showChannels(); recolour(); remember(); } }, CHANNELS[name].label)));
}

function recolour() {
  const name = state.channel, channel = CHANNELS[name];
  const values = state.data.channels[name] || [];
  // The domain stays as it is from one answer to the next: colours mean the same in all of them.
  state.tops[name] ??= defaultTop(name, values);
  const top = state.tops[name];
  const domain = domainOf(name, top), palette = paletteOf(name, state.palette);
  byId("domain").replaceChildren(...channel.domains.map((t) => el("option", { value: t, selected: t === top }, `${channel.diverging ? "±" : channel.negative ? "−" : ""}${t}`)));
  byId("domain").value = String(top);
  byId("domain").disabled = channel.domains.length < 2;
  byId("palette").disabled = Boolean(channel.diverging);
  view.colour(values, domain, palette);
  legend(domain, palette, channel);
  const positions = values.map((_, i) => i + (state.data.start || 0));
  curve.options.title = channel.label;
  curve.options.fromZero = !channel.diverging && !channel.negative;
  curve.node.querySelector(".chart-title").textContent = `${channel.sign}  ·  ${channel.about}${channel.unit ? `, ${channel.unit}` : ""}`;
  const { entropy_low: min, entropy_high: max } = name.startsWith("entropy_") ? state.data.channels : {};
  curve.update({ step: positions, value: values, min, max, downsampled: Boolean(min) }, state.data.pivots.map((p) => p.position - (state.data.start || 0)));
}

function legend(domain, palette, channel) {
  const canvas = byId("legend"), context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x += 1) {
    context.fillStyle = css(colourAt(palette, x / (canvas.width - 1)));
    context.fillRect(x, 0, 1, canvas.height);
  }
  const [low, high] = domain;
  const from = channel.diverging ? `≤ ${number(low)}` : number(low), to = `${channel.negative || channel.reversed ? "≤" : "≥"} ${number(high)}`;
  canvas.setAttribute("aria-label", `Colours from ${from} to ${to} ${channel.unit || ""}`);
  byId("legend-ends").replaceChildren(el("span", {}, from), el("span", {}, channel.unit || channel.sign), el("span", {}, to));
}

async function showPivots() {
  if (!analysis) return;
  const answer = await getJson(`${home}/cdps${query({ top: 30 })}`);
  const rows = answer.data || [];
  byId("pivots-box").hidden = !rows.length;
  byId("pivots").replaceChildren(...rows.map((pivot) => el("li", {},
    el("button", { type: "button", class: "quiet", onclick: () => choose(pivot.n ?? pivot.sequence, pivot.position) },
      el("span", { class: "mono" }, entropyText(pivot)), el("span", { class: "pivot-token mono" }, visible(pivot.token || "")),
      el("span", { class: "muted small" }, `answer ${pivot.n ?? pivot.sequence}, token ${pivot.position}`)))));
}

async function showRun() {
  const answer = await getJson(home);
  const job = answer.job || (answer.job_id ? await getJson(`/jobs/${answer.job_id}`) : null);
  byId("name").textContent = job?.name || (analysis ? "Entropy analysis" : "Credit microscope");
  byId("crumb").textContent = shortId(runId);
  if (job) byId("status").replaceChildren(pill(job.status, job.stalled));
  state.scale = answer.spec?.progress_scale ?? 1;
  state.run = answer;
  const spec = answer.spec || {}, detector = spec.detector;
  byId("inexact").hidden = !spec.logprobs;
  byId("facts").textContent = [modelName(spec.model), spec.dataset, spec.temperature && `temperature ${spec.temperature}`,
    detector && `pivots: ${detector.kind}${detector.kind === "quantile" ? ` ${100 * detector.fraction}%` : ""} per ${detector.scope}`].filter(Boolean).join("  ·  ");
  return job;
}

function step(by) {
  const index = state.sequences.findIndex((s) => s.n === state.n) + by;
  if (state.sequences[index]) choose(state.sequences[index].n);
}

async function branchHere() {
  const sequence = state.sequences.find((s) => s.n === state.n);
  if (view.current === null || !sequence || document.body.dataset.standalone) return;
  try {
    location.href = await startBranch(state.run, sequence.id, view.current);
  } catch (error) {
    showNotice(error.message);
  }
}

async function compareWith(other) {
  state.other = other;
  if (other) state.channel = "difference";
  const place = view.current;
  await choose(state.n, place);
}

function wire() {
  byId("palette").value = state.palette;
  byId("palette").addEventListener("change", () => { state.palette = byId("palette").value; localStorage.setItem("erpo-palette", state.palette); recolour(); });
  byId("domain").addEventListener("change", () => { state.tops[state.channel] = Number(byId("domain").value); recolour(); });
  byId("more").addEventListener("click", () => loadList(false));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches?.("input, select, textarea") || !state.data) return;
    if (event.key === "[") step(-1);
    else if (event.key === "]") step(1);
    else if (event.key === "b") branchHere();
    else if (!view.key(event.key, event.target)) return;
    event.preventDefault();
    remember();
  });
}

async function start() {
  wire();
  const wanted = new URLSearchParams(location.hash.slice(1));
  state.other = wanted.get("vs") || "";
  if (wanted.get("c") in CHANNELS) state.channel = wanted.get("c");
  try {
    const job = await showRun();
    await loadList();
    if (!state.sequences.length) {
      byId("tokens").replaceChildren(el("p", { class: "empty" }, job?.is_terminal ? "Nothing was recorded." : "Not analysed yet: this page looks again by itself."));
      if (!job?.is_terminal) setTimeout(() => location.reload(), 1500);
      return;
    }
    const n = Number(wanted.get("n") ?? (givenNumber || state.sequences[0].n));
    await choose(n, wanted.has("t") ? Number(wanted.get("t")) : null);
    await showPivots();
    if (!state.run.spec?.logprobs) await chooseOther(byId("other"), state, compareWith);
  } catch (error) {
    showNotice(error.message);
  }
}

start();
