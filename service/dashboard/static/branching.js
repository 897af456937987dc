// From a token of a page to its tree of branches: the one there is, or a new order.
import { getJson, postJson, query } from "./api.js";

const page = (runId) => `/analyze/branch/${runId}`;

// A training's weights are its last checkpoint's; an analysis names its model itself.
const modelOf = (run) => (run.kind === "train" ? { run: run.id, checkpoint: "last" } : run.spec.model);

function samplingOf({ spec }) {
  const { temperature, top_p, top_k, max_completion_length } = spec.sampling || spec;
  return Object.fromEntries(Object.entries({ temperature, top_p, top_k, max_completion_length }).filter(([, v]) => v !== undefined));
}

// The address of the page that shows it.
export async function startBranch(run, sequence, position) {
  const known = await getJson("/runs" + query({ kind: "branch", limit: 200 }));
  const same = known.data.find((r) => r.spec.sequence === sequence && r.spec.position === position && !["failed", "cancelled"].includes(r.status));
  if (same) return page(same.id);
  const job = await postJson("/analyze/branch", { model: modelOf(run), sequence, position, sampling: samplingOf(run) });
  return page(job.run_id);
}
