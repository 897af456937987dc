"""An evaluation: n sampled answers to each problem, checked and counted.

Batches are laid out over all answers before anything is sampled, and a batch's seed comes from what is in it: an
evaluation that was killed goes on where it stopped and ends with the numbers that it would have had.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from erpo_core.data.datasets import load_problems
from erpo_core.data.formats import Problem, problems_digest
from erpo_core.data.golds import check_golds
from erpo_core.errors import RunError
from erpo_core.evaluation_identity import evaluation_identity
from erpo_core.evaluation_summary import is_right, summarise
from erpo_core.job import JobInputs, Stop
from erpo_core.models import load_policy
from erpo_core.prompts import prompt_ids, stop_token_ids, template_digest
from erpo_core.records import Completions, Progress, Resolved, Result, Sink
from erpo_core.rewards.answers import has_answer
from erpo_core.rewards.verify import Verdict, Verifier, verifier_version
from erpo_core.specs.evaluate import EvaluateSpec

_PACKAGES = ("torch", "transformers", "peft", "math-verify", "reasoning-gym")


@dataclass(frozen=True)
class Task:
    """A problem with its prompt's token ids. ``group`` is its place in the data set."""

    group: int
    problem: Problem
    ids: list[int]


@dataclass(frozen=True)
class Batch:
    """What is sampled together: the samples from ``first`` to ``first + count`` of each task."""

    tasks: tuple[Task, ...]
    first: int
    count: int
    seed: int


def run_evaluation(spec: EvaluateSpec, inputs: JobInputs, sink: Sink, stop: Stop) -> dict[str, Any]:
    """Evaluate a model; emits Resolved, Progress, Completions and Result.

    Returns:
        The result, or ``{"stopped": True}`` if it was asked to leave: what it has sampled so far is stored.

    Raises:
        RunError: the model or the data set cannot be had, or a prompt leaves no room for an answer.
        DatasetError, UnknownReferenceError: the data set.
    """
    sink.emit(Progress("load", 0, 1))
    problems = load_problems(spec.dataset, data_root=inputs.data_root, cache_dir=inputs.cache_dir, limit=spec.limit)
    model, tokenizer, info = load_policy(inputs, dtype=_dtype(spec))
    if inputs.model.adapter_path is not None and info["dtype"] == "float32":
        model = model.merge_and_unload()  # the same function in float32, and twice as fast to sample from
    tasks = [
        Task(group, problem, prompt_ids(tokenizer, problem.problem, spec.prompt))
        for group, problem in enumerate(problems)
    ]
    _check_room(model, tasks, spec)
    sink.emit(Resolved(_resolved(spec, inputs, info, tokenizer, problems)))

    rows = [dict(row) for row in inputs.stored_rows]
    with Verifier() as verifier:
        check_golds(problems, verifier)
        run = _Run(spec, model, tokenizer, verifier, sink)
        if run.sample_all(tasks, rows, inputs.stored, stop):
            return {"stopped": True}
    result = summarise(rows, spec)
    sink.emit(Result(result))
    return result


class _Run:
    def __init__(self, spec: EvaluateSpec, model: Any, tokenizer: Any, verifier: Verifier, sink: Sink) -> None:
        from erpo_core.generation.transformers import TransformersEngine

        self.spec, self.tokenizer, self.verifier, self.sink = spec, tokenizer, verifier, sink
        self.engine = TransformersEngine(model, tokenizer)
        self.stop_ids = stop_token_ids(tokenizer)

    def sample_all(
        self, tasks: Sequence[Task], rows: list[dict[str, Any]], stored: frozenset[tuple[str, int]], stop: Stop
    ) -> bool:
        """Append the rows that are missing, batch by batch. True if asked to leave in between."""
        total = len(tasks) * self.spec.num_samples
        done = before = len(stored)
        right = sum(is_right(row, self.spec) for row in rows)
        tokens, started = 0, time.monotonic()
        for batch in lay_out(tasks, self.spec):
            keys = {(task.problem.id, sample) for task in batch.tasks for sample in _samples(batch)}
            if keys <= stored:
                continue
            if stop.requested:
                return True
            fresh = [row for row in self.sample(batch) if (row["prompt_id"], row["sample"]) not in stored]
            self.sink.emit(Completions(0, fresh))
            rows += fresh
            done += len(fresh)
            right += sum(row["reward"] == 1.0 for row in fresh)
            tokens += sum(row["num_tokens"] for row in fresh)
            self.sink.emit(
                Progress("generate", done, total, _speed(right / done, tokens, done - before, total - done, started))
            )
        return False

    def sample(self, batch: Batch) -> list[dict[str, Any]]:
        """The rows of a batch, problem by problem."""
        sampling = self.spec.sampling
        groups = self.engine.generate(
            [task.ids for task in batch.tasks],
            n=batch.count,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_new_tokens=sampling.max_completion_length,
            stop_ids=self.stop_ids,
            seed=batch.seed,
        )
        answers = [
            (task, number, sample, self._text(sample.token_ids))
            for task, group in zip(batch.tasks, groups, strict=True)
            for number, sample in zip(_samples(batch), group, strict=True)
        ]
        verdicts = self.verifier.check_many([(task.problem.answer, text) for task, _, _, text in answers])
        return [self._row(*answer, verdict) for answer, verdict in zip(answers, verdicts, strict=True)]

    def _text(self, token_ids: Sequence[int]) -> str:
        # PostgreSQL's text holds no NUL character.
        return self.tokenizer.decode(token_ids, skip_special_tokens=True).replace("\0", "\ufffd")

    def _row(self, task: Task, number: int, sample: Any, text: str, verdict: Verdict) -> dict[str, Any]:
        row = {
            "prompt_id": task.problem.id,
            "group": task.group,
            "sample": number,
            "prompt": task.problem.problem,
            "completion": text,
            "gold": task.problem.answer,
            "level": None if task.problem.level is None else str(task.problem.level)[:40],
            "subject": task.problem.subject and task.problem.subject[:200],
            "advantage": None,
            "verdict": str(verdict),
            "boxed": has_answer(text),
            "truncated": not sample.finished,
            "num_tokens": len(sample.token_ids),
        }
        right = float(is_right(row, self.spec))
        return {**row, "reward": right, "rewards": {"accuracy": right, "boxed_format": float(row["boxed"])}}


def lay_out(tasks: Sequence[Task], spec: EvaluateSpec) -> Iterator[Batch]:
    """Batches of at most ``batch_size`` sequences, prompts of like length together; the same for the same request."""
    ordered = sorted(tasks, key=lambda task: (len(task.ids), task.group))
    per_batch = max(1, spec.batch_size // spec.num_samples)
    for start in range(0, len(ordered), per_batch):
        together = tuple(ordered[start : start + per_batch])
        for first in range(0, spec.num_samples, spec.batch_size):
            count = min(spec.batch_size, spec.num_samples - first)
            yield Batch(together, first, count, _seed(spec, together, first))


def _seed(spec: EvaluateSpec, tasks: Sequence[Task], first: int) -> int:
    text = json.dumps([spec.sampling.seed, first, [task.problem.id for task in tasks]])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


def _samples(batch: Batch) -> range:
    return range(batch.first, batch.first + batch.count)


def _speed(acc: float, tokens: int, done: int, left: int, started: float) -> dict[str, float]:
    seconds = max(time.monotonic() - started, 1e-9)
    return {
        "acc": acc,
        "reward": acc,
        "tokens_per_second": tokens / seconds,
        "eta_seconds": left * seconds / max(done, 1),
    }


def _dtype(spec: EvaluateSpec) -> Any:
    import torch

    return None if spec.bf16 is None else torch.bfloat16 if spec.bf16 else torch.float32


def _check_room(model: Any, tasks: Sequence[Task], spec: EvaluateSpec) -> None:
    room = getattr(model.config, "max_position_embeddings", None)
    longest = max(tasks, key=lambda task: len(task.ids))
    wanted = len(longest.ids) + spec.sampling.max_completion_length
    if room is not None and wanted > room:
        raise RunError(
            f"the prompt of {longest.problem.id} has {len(longest.ids)} tokens: with max_completion_length "
            f"{spec.sampling.max_completion_length} that is more than the {room} the model has places for",
            code="prompt_too_long",
        )


def _resolved(
    spec: EvaluateSpec, inputs: JobInputs, info: dict[str, Any], tokenizer: Any, problems: Sequence[Problem]
) -> dict[str, Any]:
    found = {
        **info,
        "dataset": spec.dataset,
        "dataset_digest": problems_digest(problems),
        "num_problems": len(problems),
        "num_samples": spec.num_samples,
        "template_digest": template_digest(tokenizer, spec.prompt),
        "stop_token_ids": stop_token_ids(tokenizer),
        "seed": spec.sampling.seed,
        "stored_answers": len(inputs.stored),
        "versions": {name: installed for name in _PACKAGES if (installed := _version(name))},
    }
    return {**found, "identity": evaluation_identity(spec, found, verifier_version())}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
