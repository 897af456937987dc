// Two analyses of the same tokens: the difference of their entropies becomes a channel like the others.
import { getJson, query } from "./api.js";
import { el, modelName, shortId } from "./dom.js";

const PAGES = 5;

// Fill the choice of analyses other than `run`; `onChoose` gets a run's id, or "".
export async function chooseOther(select, { run, other: chosen }, onChoose) {
  if (!select) return;
  const found = await getJson("/runs" + query({ kind: "entropy", limit: 100 }));
  for (const other of found.data) {
    if (other.id === run.id || other.status !== "succeeded" || other.spec.logprobs) continue;
    select.append(el("option", { value: other.id }, `${modelName(other.spec.model)} · ${shortId(other.id)}`));
  }
  select.closest("label").hidden = select.options.length < 2;
  select.value = chosen;
  select.addEventListener("change", () => onChoose(select.value));
}

const sameTokens = (a, b) => a.length === b.length && a.every((token, i) => token === b[i]);

// Adds the channel `difference` to `data` where the other analysis has a sequence of the same tokens.
export async function withDifference(data, other) {
  if (!other) return;
  const home = `/analyze/entropy/${other}/sequences`;
  const length = data.token_ids.length;
  let cursor = null;
  for (let page = 0; page < PAGES; page += 1) {
    const answer = await getJson(home + query({ limit: 200, cursor }));
    for (const sequence of answer.data.filter((s) => s.num_tokens === length).sort((a, b) => (b.n === data.n) - (a.n === data.n))) {
      const theirs = await getJson(`${home}/${sequence.n}/tokens` + query({ channels: "entropy" }));
      if (!sameTokens(theirs.token_ids, data.token_ids)) continue;
      data.channels.difference = theirs.channels.entropy.map((h, i) => (h === null || data.channels.entropy[i] === null ? null : h - data.channels.entropy[i]));
      return;
    }
    if (!(cursor = answer.next_cursor)) break;
  }
  throw new Error("The other analysis has no sequence of the same tokens");
}
