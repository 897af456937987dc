"""What if it had said something else here: the likeliest tokens at one place, each continued and checked."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from erpo_core.analysis.checked import checked_rows, is_right
from erpo_core.analysis.scoring import best_tokens, score_answer
from erpo_core.analysis.statistics import wilson_interval
from erpo_core.errors import SpecError
from erpo_core.generation.base import watch_and_leave
from erpo_core.generation.seeds import mixed_seed
from erpo_core.generation.transformers import TransformersEngine
from erpo_core.job import JobInputs, Stop, leaves_early
from erpo_core.models import context_length, load_policy
from erpo_core.prompts import prompt_ids, stop_token_ids
from erpo_core.records import Completions, Progress, Result, Sink
from erpo_core.resolved import report_resolved
from erpo_core.rewards.answers import extract_boxed
from erpo_core.rewards.verify import Verifier
from erpo_core.specs.branch import BranchSpec
from erpo_core.specs.common import PromptSpec

_NUM_EXAMPLES = 3
_NUM_ANSWERS = 8
_CONTEXT_CHARS = 400


@dataclass(frozen=True)
class Branch:
    """One token that could stand at the place."""

    token_id: int
    token: str
    logp: float
    is_written: bool
    is_end: bool
    """A stop token: the answer ends with it, nothing is left to sample."""

    def key(self, position: int) -> str:
        """Names the branch in stored rows."""
        return f"{position}/{self.token_id}"


@leaves_early
def run_branch(spec: BranchSpec, inputs: JobInputs, sink: Sink, stop: Stop) -> dict[str, Any]:
    """Grow the tree; emits Resolved, Progress, Completions (one row a continuation) and Result.

    ``inputs.source``: ``{"prompt", "token_ids", "prompt_spec", "gold", "tokenizer_digest"}`` of the stored sequence.

    Returns:
        The result, or ``{"stopped": True}``: what is stored is used again by the next attempt.

    Raises:
        SpecError: the model has another tokenizer, or not enough room for a continuation.
    """
    sink.emit(Progress("load", 0, 1))
    dtype = None if spec.bf16 is None else torch.bfloat16 if spec.bf16 else torch.float32
    model, tokenizer, info = load_policy(inputs, dtype=dtype)
    if inputs.model.adapter_path is not None and info["dtype"] == "float32":
        model = model.merge_and_unload()
    model.eval()
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    report_resolved(sink, inputs, {**info, "versions": versions})
    source = inputs.source
    prompt = prompt_ids(tokenizer, source["prompt"], PromptSpec.model_validate(source["prompt_spec"]))
    _check(spec, source, model, info, len(prompt))
    scored = score_answer(
        model, tokenizer, prompt, source["token_ids"][: spec.position + 1], temperature=spec.temperature
    )
    branches = find_branches(spec, model, tokenizer, scored)
    with Verifier() as verifier:
        engine = TransformersEngine(model, tokenizer)
        engine.watch = watch_and_leave(stop)
        tree = _Tree(spec, engine, verifier, prompt, inputs)
        tree.grow(branches, sink)
    result = {
        "prompt": source["prompt"],
        "prefix": tokenizer.decode(tree.prefix, skip_special_tokens=True)[-_CONTEXT_CHARS:],
        "position": spec.position,
        "entropy": float(scored.columns["entropy"][-1]),
        "gold": tree.gold,
        "branches": [_outcome(branch, tree.rows[branch.key(spec.position)], tree.gold) for branch in branches],
    }
    sink.emit(Result(result))
    return result


def _check(spec: BranchSpec, source: dict[str, Any], model: Any, info: dict[str, Any], prompt_tokens: int) -> None:
    if source["tokenizer_digest"] not in (None, info["tokenizer_digest"]):
        raise SpecError(
            "this model's tokenizer is not that of the sequence",
            pointer="/model",
            mend="name the model that wrote the sequence, or a checkpoint trained from it",
        )
    room = context_length(model.config)
    left = None if room is None else room - prompt_tokens - spec.position - 1
    if left is not None and spec.sampling.max_completion_length > left:
        raise SpecError(
            f"the prompt and {spec.position + 1} tokens of the answer leave room for {left} tokens",
            pointer="/sampling/max_completion_length",
            mend=f"write at most {max(left, 1)}",
        )


def find_branches(spec: BranchSpec, model: Any, tokenizer: Any, scored: Any) -> list[Branch]:
    """The ``num_alternatives`` likeliest tokens at the last scored place, best first; the written one in any case."""
    written = scored.token_ids[-1]
    last = np.array([len(scored.token_ids) - 1])
    ids, logps = best_tokens(model, scored, last, spec.num_alternatives, temperature=spec.temperature)
    found = dict(zip(ids[0].tolist(), logps[0].tolist(), strict=True))
    found.setdefault(written, float(scored.columns["logp"][-1]))
    ends = set(stop_token_ids(tokenizer, model))
    return [
        Branch(token, tokenizer.decode([token]), logp, token == written, token in ends) for token, logp in found.items()
    ]


class _Tree:
    def __init__(
        self, spec: BranchSpec, engine: TransformersEngine, verifier: Verifier, prompt: list[int], inputs: JobInputs
    ):
        self.spec, self.engine, self.verifier, self.prompt = spec, engine, verifier, prompt
        self.problem = inputs.source["prompt"]
        self.prefix = inputs.source["token_ids"][: spec.position]
        self.gold = spec.gold or inputs.source["gold"]
        self.rows: dict[str, list[dict[str, Any]]] = {}
        for row in sorted(inputs.stored_rows, key=lambda row: row["sample"]):
            self.rows.setdefault(row["prompt_id"], []).append(row)

    def grow(self, branches: Sequence[Branch], sink: Sink) -> None:
        """Rows of every branch, batch by batch, stored ones taken as they are."""
        size = max(1, self.spec.batch_size // self.spec.num_continuations)
        for start in range(0, len(branches), size):
            batch = branches[start : start + size]
            if not all(branch.key(self.spec.position) in self.rows for branch in batch):
                found = self._continue(batch, start)
                sink.emit(Completions(0, [row for key, rows in found.items() if key not in self.rows for row in rows]))
                self.rows = found | self.rows
            sink.emit(Progress("continue", start + len(batch), len(branches)))

    def _continue(self, branches: Sequence[Branch], start: int) -> dict[str, list[dict[str, Any]]]:
        """All continuations share the prompt and what was written before the place."""
        sampling, stop_ids = self.spec.sampling, stop_token_ids(self.engine.tokenizer, self.engine.model)
        open_ends = [branch for branch in branches if not branch.is_end]
        groups = self.engine.generate(
            [[*self.prompt, *self.prefix, branch.token_id] for branch in open_ends],
            n=self.spec.num_continuations,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_new_tokens=sampling.max_completion_length,
            stop_ids=stop_ids,
            seed=_seed(self.spec, start),
        )
        tails = {branch: [([], True)] for branch in branches}
        for branch, samples in zip(open_ends, groups, strict=True):
            tails[branch] = [(sample.token_ids, sample.finished) for sample in samples]
        return {branch.key(self.spec.position): self._rows(branch, found) for branch, found in tails.items()}

    def _rows(self, branch: Branch, tails: Sequence[tuple[list[int], bool]]) -> list[dict[str, Any]]:
        return checked_rows(
            self.verifier,
            self.engine.tokenizer,
            [([*self.prefix, branch.token_id, *tail], finished) for tail, finished in tails],
            prompt_id=branch.key(self.spec.position),
            group=0,
            prompt=self.problem,
            gold=self.gold,
        )


def _outcome(branch: Branch, found: Sequence[dict[str, Any]], gold: str | None) -> dict[str, Any]:
    answers = Counter(extract_boxed(row["completion"]) or "" for row in found)
    outcome = {
        "token": branch.token,
        "token_id": branch.token_id,
        "logp": branch.logp,
        "is_written": branch.is_written,
        "num": len(found),
        "truncated": sum(row["truncated"] for row in found),
        "answers": [{"answer": answer, "count": count} for answer, count in answers.most_common(_NUM_ANSWERS)],
        "examples": [row["completion"][-_CONTEXT_CHARS:] for row in found[:_NUM_EXAMPLES]],
        "right": None,
        "rate": None,
    }
    if gold:
        right = sum(map(is_right, found))
        low, high = wilson_interval(right, len(found))
        outcome |= {"right": right, "rate": {"value": right / len(found), "low": low, "high": high}}
    return outcome


def _seed(spec: BranchSpec, start: int) -> int:
    return mixed_seed(spec.sampling.seed, spec.sequence, spec.position, start)
