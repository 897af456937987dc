"""Rough sizes of an order, for ``?dry_run=true``: steps, tokens, memory, bytes of traces."""

from collections.abc import Sequence
from math import ceil
from typing import Any

from erpo_core.memory import ModelSize, training_memory
from erpo_core.specs import BranchSpec, EntropySpec, EvaluateSpec, PerturbationSpec
from erpo_core.specs.train import BaseTrainSpec, GrpoTrainSpec, SftTrainSpec

_TRAIN_TRACE_BYTES = 20
_TRACE_BYTES = 12
"""Compressed bytes per token: ten channels in training, six otherwise."""


def estimate(
    spec: Any,
    num_problems: int | None,
    *,
    size: ModelSize | None = None,
    num_tokens: int | None = None,
    num_eval_problems: Sequence[int | None] = (),
) -> dict[str, int | float | None]:
    """Upper bounds; None where the size of the data set or of the model is not known before it is loaded.

    ``num_tokens``: of the stored answers that an entropy analysis names, if they are there already.
    ``num_eval_problems``: of each benchmark that a training is evaluated on.
    """
    if isinstance(spec, GrpoTrainSpec | SftTrainSpec):
        found = _train(spec, num_problems) if isinstance(spec, GrpoTrainSpec) else _imitate(spec, num_problems)
        found |= _evaluations(spec, found["steps"], num_eval_problems)
        return found | (training_memory(spec, size) if size else {})
    if isinstance(spec, EvaluateSpec):
        return _evaluate(spec, num_problems)
    if isinstance(spec, PerturbationSpec):
        return _perturbation(spec, num_problems)
    if isinstance(spec, BranchSpec):
        return _branch(spec)
    return _entropy(spec, num_problems, num_tokens)


def _train(spec: GrpoTrainSpec, num_problems: int | None) -> dict[str, int | float | None]:
    steps: int | None = spec.max_steps if spec.max_steps > 0 else None
    if steps is None and num_problems is not None:
        steps = ceil(num_problems // spec.prompts_per_step * spec.num_train_epochs * spec.num_iterations)
    rounds = 1 + (spec.max_resample_rounds if spec.dynamic_sampling else 0)
    completions = None if steps is None else ceil(steps / spec.num_iterations) * spec.generation_batch_size * rounds
    longest = spec.max_completion_length or spec.max_length - 1
    traced_steps = _traced_steps(steps, spec.trace_every)
    traced = None if traced_steps is None else traced_steps * spec.trace_groups * spec.num_generations
    return {
        "num_problems": num_problems,
        "steps": steps,
        "completions": completions,
        "completion_tokens": None if completions is None else completions * longest,
        "traced_sequences": traced,
        "trace_bytes": None if traced is None else traced * longest * _TRAIN_TRACE_BYTES,
    }


def _traced_steps(steps: int | None, every: int) -> int | None:
    """The first step, the last, and every ``every``-th between them; None where their number is not known."""
    if not every or steps is None:
        return None if every else 0
    return steps // every + (every > 1) + (steps > 1 and steps % every > 0)


def _imitate(spec: SftTrainSpec, num_problems: int | None) -> dict[str, int | float | None]:
    steps: int | None = spec.max_steps if spec.max_steps > 0 else None
    if steps is None and num_problems is not None:
        steps = ceil(ceil(num_problems / spec.train_batch_size) * spec.num_train_epochs)
    sequences = None if steps is None else steps * spec.train_batch_size
    tokens = None if sequences is None else sequences * spec.max_length
    return {"num_problems": num_problems, "steps": steps, "sequences": sequences, "tokens": tokens, "trace_bytes": 0}


def _evaluations(
    spec: BaseTrainSpec, steps: int | None, num_problems: Sequence[int | None]
) -> dict[str, int | float | None]:
    """What a training samples in its evaluations."""
    if not spec.eval_every:
        return {}
    sizes = [_least(count, spec.eval_limit) for count in num_problems]
    if steps is None or None in sizes:
        return {"eval_completions": None, "eval_completion_tokens": None}
    # Before the first step, and after every `eval_every` up to the last.
    completions = (1 + ceil(steps / spec.eval_every)) * sum(sizes) * spec.eval_num_samples
    own = getattr(spec, "max_completion_length", None) or spec.max_length - 1
    length = spec.eval_sampling.max_completion_length or own
    return {"eval_completions": completions, "eval_completion_tokens": completions * length}


def _least(*counts: int | None) -> int | None:
    return min((count for count in counts if count is not None), default=None)


def _evaluate(spec: EvaluateSpec, num_problems: int | None) -> dict[str, int | float | None]:
    if spec.answers_of is not None:
        return {"completions": 0, "completion_tokens": 0, "trace_bytes": 0}
    problems = _least(num_problems, spec.limit)
    completions = None if problems is None else problems * spec.num_samples * len(spec.each())
    tokens = None if completions is None else completions * spec.sampling.max_completion_length
    return {"num_problems": problems, "completions": completions, "completion_tokens": tokens, "trace_bytes": 0}


def _perturbation(spec: PerturbationSpec, num_problems: int | None) -> dict[str, int | float | None]:
    tried = _least(num_problems, spec.limit)
    wanted = spec.num_problems if tried is None else min(spec.num_problems, tried)
    places = spec.num_positions if spec.mode == "branch_one" else 1
    outcomes = wanted * len(spec.arms) * places * spec.num_continuations
    completions = None if tried is None else tried * spec.num_attempts + outcomes
    length = spec.sampling.max_completion_length
    return {
        "num_problems": wanted,
        "outcomes": outcomes,
        "completions": completions,
        "completion_tokens": None if completions is None else completions * length,
        "trace_bytes": wanted * length * _TRACE_BYTES,
    }


def _branch(spec: BranchSpec) -> dict[str, int | float | None]:
    completions = (spec.num_alternatives + 1) * spec.num_continuations
    tokens = completions * spec.sampling.max_completion_length
    return {"completions": completions, "completion_tokens": tokens, "trace_bytes": 0}


def _entropy(spec: EntropySpec, num_problems: int | None, num_tokens: int | None) -> dict[str, int | float | None]:
    if spec.source:
        sequences, tokens = spec.source.limit, num_tokens
    elif spec.texts:
        sequences = len(spec.texts)
        # A token is hardly ever shorter than one character.
        tokens = sum(len(pair.response) for pair in spec.texts)
    elif spec.logprobs:
        sequences = len(spec.logprobs.texts)
        tokens = sum(len(one.content) for one in spec.logprobs.texts)
    else:
        known = len(spec.prompts) if num_problems is None else num_problems
        sequences = (min(spec.limit, known or spec.limit) if spec.dataset else known) * spec.num_samples
        tokens = sequences * spec.sampling.max_completion_length
    trace_bytes = None if tokens is None else tokens * _TRACE_BYTES
    return {"sequences": sequences, "tokens": tokens, "trace_bytes": trace_bytes}
