"""Disturb right answers at tokens of high and of low entropy, let the model go on, and see whether it still gets there.

The experiment behind Fig. 1b of arXiv 2603.28204 with the controls that it needs: problems are found by sampling, every
arm disturbs the same answers at equally many tokens, continuations of one batch layout use the same random numbers in
every arm, and what is compared are problems, not continuations.
"""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from erpo_core.analysis.checked import checked_rows
from erpo_core.analysis.perturbation_cases import Case, CaseFinder, Variant, sample, seed_of
from erpo_core.analysis.perturbation_summary import summarise
from erpo_core.data.datasets import load_problems
from erpo_core.data.formats import problems_digest
from erpo_core.generation.base import watch_and_leave
from erpo_core.generation.transformers import TransformersEngine
from erpo_core.job import JobInputs, Stop, leaves_early
from erpo_core.models import load_policy
from erpo_core.prompts import template_digest
from erpo_core.records import Completions, Progress, Result, Sink
from erpo_core.resolved import report_resolved
from erpo_core.rewards.verify import Verifier
from erpo_core.specs.perturbation import OUTCOMES_STEP, Arm, PerturbationSpec


@leaves_early
def run_perturbation(spec: PerturbationSpec, inputs: JobInputs, sink: Sink, stop: Stop) -> dict[str, Any]:
    """Run the experiment; emits Resolved, Progress, Trace (the undisturbed answers), Completions and Result.

    Returns:
        The summary, or ``{"stopped": True}``: what is stored is used again by the next attempt.

    Raises:
        RunError: ``nothing_solved``: no answer could be disturbed; or the model or the data set cannot be had.
        SpecError: two answers' lengths do not fit into the model's context.
    """
    import torch

    sink.emit(Progress("load", 0, 1))
    problems = load_problems(spec.dataset, data_root=inputs.data_root, cache_dir=inputs.cache_dir, limit=spec.limit)
    dtype = None if spec.bf16 is None else torch.bfloat16 if spec.bf16 else torch.float32
    model, tokenizer, info = load_policy(inputs, dtype=dtype)
    if inputs.model.adapter_path is not None and info["dtype"] == "float32":
        model = model.merge_and_unload()
    model.eval()
    resolved = {
        **info,
        "dataset_digest": problems_digest(problems),
        "num_problems": len(problems),
        "template_digest": template_digest(tokenizer, spec.prompt),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    report_resolved(sink, inputs, resolved)
    engine = TransformersEngine(model, tokenizer)
    engine.watch = watch_and_leave(stop)
    with Verifier() as verifier:
        finder = CaseFinder(spec, model, engine, info, verifier, sink, inputs)
        cases = finder.find(problems)
        study = _Study(spec, engine, verifier, sink)
        rows = study.continue_all(cases, inputs.stored_rows)
    facts = [_facts(case, arm, finder.vocabulary.texts) for case in cases for arm in spec.arms]
    summary = summarise(rows, facts, spec) | finder.counts
    sink.emit(Result(summary))
    return summary


class _Study:
    def __init__(self, spec: PerturbationSpec, engine: TransformersEngine, verifier: Verifier, sink: Sink) -> None:
        self.spec, self.engine, self.verifier, self.sink = spec, engine, verifier, sink

    def continue_all(self, cases: Sequence[Case], stored_rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """An outcome for every continuation of every variant, stored ones taken as they are."""
        stored = {(row["prompt_id"], row["sample"]): row for row in stored_rows}
        rows: list[dict[str, Any]] = []
        num_variants = {len(variants) for case in cases for variants in case.variants.values()}
        size = max(1, self.spec.batch_size // (max(num_variants) * self.spec.num_continuations))
        total = sum(len(v) for case in cases for v in case.variants.values()) * self.spec.num_continuations
        for start in range(0, len(cases), size):
            for arm in self.spec.arms:
                batch = [(case, variant) for case in cases[start : start + size] for variant in case.variants[arm]]
                keys = [(v.key(c.group), k) for c, v in batch for k in range(self.spec.num_continuations)]
                if not all(key in stored for key in keys):
                    found = self._continue(batch, seed_of(self.spec, "continue", start))
                    fresh = {(row["prompt_id"], row["sample"]): row for row in found}
                    missing = [row for key, row in fresh.items() if key not in stored]
                    self.sink.emit(Completions(OUTCOMES_STEP, missing))
                    stored = fresh | stored
                rows += [stored[key] for key in keys]
                self.sink.emit(Progress("continue", len(rows), total))
        return rows

    def _continue(self, batch: Sequence[tuple[Case, Variant]], seed: int) -> list[dict[str, Any]]:
        prompts = [case.prompt + variant.prefix for case, variant in batch]
        rows = []
        groups = sample(self.spec, self.engine, prompts, self.spec.num_continuations, seed)
        for (case, variant), samples in zip(batch, groups, strict=True):
            rows += checked_rows(
                self.verifier,
                self.engine.tokenizer,
                [(variant.prefix + one.token_ids, one.finished) for one in samples],
                prompt_id=variant.key(case.group),
                group=case.group,
                prompt=case.problem.problem,
                gold=case.problem.answer,
            )
        return rows


def _facts(case: Case, arm: Arm, texts: Sequence[str]) -> dict[str, Any]:
    """What a summary and its readers want to know of an arm's edits of one answer."""
    edits = [edit for variant in case.variants[arm] for edit in variant.edits]
    return {
        "group": case.group,
        "arm": arm,
        "edits": [
            {
                "position": edit.position,
                "progress": edit.position / len(case.tokens),
                "entropy": float(case.entropies[edit.position]),
                "token": case.tokens[edit.position],
                "replacement": None if edit.replacement is None else texts[edit.replacement],
                "surprisal": None if edit.logp is None else -edit.logp,
            }
            for edit in edits
        ],
    }
