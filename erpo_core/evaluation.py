"""An evaluation: n sampled answers to each problem, checked and counted.

Batches are laid out over all answers before anything is sampled, and a batch's seed comes from what is in it: an
evaluation that was killed goes on where it stopped and ends with the numbers that it would have had. While a batch is
sampled, the answers of the one before are checked and stored.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from typing import Any

from erpo_core.data.datasets import load_problems
from erpo_core.data.golds import check_golds
from erpo_core.evaluation_again import judge_again
from erpo_core.evaluation_answers import AnswerBook
from erpo_core.evaluation_batches import Batch
from erpo_core.evaluation_model import EvaluatedModel
from erpo_core.evaluation_summary import summarise
from erpo_core.generation.base import Engine, watch_and_leave
from erpo_core.job import JobInputs, Stop, leaves_early
from erpo_core.records import Progress, Result, Sink
from erpo_core.resolved import report_resolved
from erpo_core.rewards.verify import Verifier
from erpo_core.specs.evaluate import EvaluateSpec


@leaves_early
def run_evaluation(spec: EvaluateSpec, inputs: JobInputs, sink: Sink, stop: Stop) -> dict[str, Any]:
    """Evaluate the model of each run of a job; emits Progress, and for each run Resolved, Completions and Result.

    Runs of one base model share the loaded engine: their adapters are put on it one after the other. A run whose
    answers are all stored is only counted.

    Returns:
        The result of the last run, or ``{"stopped": True}`` if it was asked to leave: what is sampled is stored.

    Raises:
        RunError: the model or the data set cannot be had, or a prompt leaves no room for an answer.
        DatasetError, UnknownReferenceError: the data set.
    """
    if spec.answers_of is not None:
        return judge_again(spec, inputs, sink, stop)
    sink.emit(Progress("load", 0, 1))
    problems = load_problems(spec.dataset, data_root=inputs.data_root, cache_dir=inputs.cache_dir, limit=spec.limit)
    runs = (inputs, *inputs.also)
    done, per_run, result = 0, len(problems) * spec.num_samples, {}
    with Verifier() as verifier:
        check_golds(problems, verifier)
        for _, of_one_base in groupby(runs, key=lambda run: run.model.base):
            same = list(of_one_base)
            with EvaluatedModel(spec, problems, same) as model:
                for run in same:
                    book = AnswerBook(
                        spec, run, model.tokenizer, verifier, sink, before=done, total=per_run * len(runs)
                    )
                    done += per_run
                    _answer(model, run, spec, book, sink, stop)
                    result = summarise(book.rows, spec)
                    sink.emit(Result(result, run.run_id))
    return result


def _answer(
    model: EvaluatedModel, run: JobInputs, spec: EvaluateSpec, book: AnswerBook, sink: Sink, stop: Stop
) -> None:
    """Sample what is missing of a run."""
    missing = [batch for batch in model.batches if not book.has_all(batch.keys)]
    engine = model.engine_of(run) if missing else None
    report_resolved(sink, run, model.resolved(run))
    if engine is not None:
        _sample_all(engine, model.stop_ids, missing, spec, book, stop)


def _sample_all(
    engine: Engine, stop_ids: list[int], batches: Sequence[Batch], spec: EvaluateSpec, book: AnswerBook, stop: Stop
) -> None:
    """Sample batch by batch. Where it leaves early, what was sampled whole is stored."""
    engine.watch = watch_and_leave(stop, book.watch)
    sampled = engine.generate_each(_call(batch, stop_ids, spec) for batch in batches)
    storing: Future[None] | None = None
    with ThreadPoolExecutor(max_workers=1) as checker:
        for batch, groups in zip(batches, sampled, strict=True):
            if storing is not None:
                storing.result()
            storing = checker.submit(book.add, batch.answers(groups))
    if storing is not None:
        storing.result()


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
