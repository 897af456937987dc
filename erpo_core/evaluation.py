"""One evaluation job: n answers to each problem, checked, stored as they come, counted at the end."""

import hashlib
import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch

from erpo_core.data.datasets import load_problems
from erpo_core.data.formats import Problem, problems_digest
from erpo_core.evaluation_summary import summarise
from erpo_core.generation.transformers import Sample, TransformersEngine
from erpo_core.job import JobInputs, Stop
from erpo_core.models import load_policy
from erpo_core.prompts import prompt_ids, stop_token_ids
from erpo_core.records import Completions, Progress, Resolved, Result, Sink
from erpo_core.rewards.answers import extract_boxed
from erpo_core.rewards.verify import Verdict, Verifier
from erpo_core.specs.evaluate import EvaluateSpec

Task = tuple[Problem, list[int]]
"""A problem, and the numbers of the samples that it still lacks."""


def run_evaluation(spec: EvaluateSpec, inputs: JobInputs, sink: Sink, stop: Stop) -> dict[str, Any]:
    """Evaluate and report. Answers that an earlier attempt stored are neither generated nor counted twice.

    Returns:
        The summary; ``{"stopped": True}`` where ``stop`` ended it early: what is stored stays.
    """
    started = time.monotonic()
    sink.emit(Progress("load", 0, 1))
    dtype = torch.bfloat16 if (torch.cuda.is_available() if spec.bf16 is None else spec.bf16) else torch.float32
    model, tokenizer, info = load_policy(inputs, dtype=dtype)
    problems = load_problems(spec.dataset, data_root=inputs.data_root, limit=spec.limit)
    sink.emit(Resolved(_resolved(spec, info, problems)))
    engine = TransformersEngine(model, tokenizer)
    rows = list(inputs.stored_rows)
    total, tokens = len(problems) * spec.num_samples, 0
    with Verifier() as verifier:
        for number, batch in enumerate(_batches(problems, spec, inputs.stored)):
            if stop.requested:
                return {"stopped": True}
            fresh = _answer(engine, tokenizer, verifier, batch, spec, number)
            tokens += sum(row["num_tokens"] for row in fresh)
            rows += fresh
            sink.emit(Completions(0, fresh))
            seconds = time.monotonic() - started
            data = {
                "acc": summarise(rows)["acc"],
                "tokens_per_second": tokens / seconds,
                "eta_seconds": seconds / len(rows) * (total - len(rows)),
            }
            sink.emit(Progress("generate", len(rows), total, data))
    summary = summarise(rows, spec.pass_at) | {"seconds": time.monotonic() - started, "tokens": tokens}
    sink.emit(Result(summary))
    return summary


def _batches(problems: list[Problem], spec: EvaluateSpec, stored: frozenset[tuple[str, int]]) -> Iterator[list[Task]]:
    """Problems whose missing answers fill about ``batch_size`` sequences."""
    batch, size = [], 0
    for problem in problems:
        missing = [sample for sample in range(spec.num_samples) if (str(problem.id), sample) not in stored]
        if not missing:
            continue
        batch.append((problem, missing))
        size += spec.num_samples
        if size >= spec.batch_size:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _answer(engine, tokenizer, verifier, batch: list[Task], spec: EvaluateSpec, number: int) -> list[dict[str, Any]]:
    sampling = spec.sampling
    groups = engine.generate(
        [prompt_ids(tokenizer, problem.problem, spec.prompt) for problem, _ in batch],
        n=max(len(missing) for _, missing in batch),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_new_tokens=sampling.max_completion_length,
        stop_ids=stop_token_ids(tokenizer),
        seed=(sampling.seed * 1_000_003 + int(hashlib.sha256(str(batch[0][0].id).encode()).hexdigest()[:8], 16))
        % 2**31,
    )
    return [
        _row(tokenizer, verifier, problem, number + index, sample, answer, spec)
        for index, ((problem, missing), group) in enumerate(zip(batch, groups, strict=True))
        for sample, answer in zip(missing, group, strict=False)
    ]


def _row(tokenizer, verifier, problem: Problem, group: int, sample: int, answer: Sample, spec: EvaluateSpec) -> dict:
    text = tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    verdict = verifier.check(problem.answer, text)
    if not answer.finished and spec.truncated_boxed == "wrong" and verdict is Verdict.RIGHT:
        verdict = Verdict.WRONG
    return {
        "prompt_id": str(problem.id),
        "group": group,
        "sample": sample,
        "prompt": problem.problem,
        "completion": text,
        "gold": problem.answer,
        "rewards": {},
        "reward": float(verdict is Verdict.RIGHT),
        "verdict": str(verdict),
        "boxed": extract_boxed(text) is not None,
        "truncated": not answer.finished,
        "num_tokens": len(answer.token_ids),
    }


def _resolved(spec: EvaluateSpec, info: dict[str, Any], problems: list[Problem]) -> dict[str, Any]:
    return {
        "model": info,
        "dataset": {"ref": spec.dataset, "digest": problems_digest(problems), "num_problems": len(problems)},
        "prompt_digest": hashlib.sha256(spec.prompt.model_dump_json().encode()).hexdigest(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "math-verify")},
    }
