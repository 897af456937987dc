"""Evaluations of the policy while it is trained.

What an evaluation job does, by the same code but with the trainer's own engine: the policy of a step answers the
benchmarks, the answers are checked and counted, and the numbers become metrics of that step. Seeds come from the
specification alone, so that every step is asked the same with the same luck, and nothing of the training is touched: it
ends with the same weights with and without. Several processes share the batches.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from erpo_core.data.datasets import load_problems
from erpo_core.data.formats import problems_digest
from erpo_core.data.golds import check_golds
from erpo_core.evaluation_answers import judged
from erpo_core.evaluation_batches import Batch, check_room, lay_out, longest_of, make_tasks
from erpo_core.evaluation_summary import summarise
from erpo_core.generation.base import Watch, watch_and_leave
from erpo_core.generation.policy import BATCH_SIZES
from erpo_core.job import JobInputs, LeftEarlyError, Stop
from erpo_core.metric_names import benchmark_labels
from erpo_core.models import default_device
from erpo_core.records import Metrics, Progress, Sink
from erpo_core.rewards.verify import Verifier
from erpo_core.specs.common import LONGEST_ANSWER, SamplingSpec
from erpo_core.specs.evaluate import EvaluateSpec
from erpo_core.specs.train import BaseTrainSpec
from erpo_core.trainer import ranks
from erpo_core.trainer.callbacks import RecordCallback
from erpo_core.trainer.guards import is_inside_cycle

_NOTHING = Batch((), 0, 1, 0)


@dataclass(frozen=True)
class TrainingBenchmark:
    """A benchmark of a training. ``spec`` is that of an evaluation job which would sample the same."""

    label: str
    spec: EvaluateSpec
    batches: tuple[Batch, ...]
    digest: str
    num_problems: int

    def described(self) -> dict[str, Any]:
        """For the ``resolved`` record."""
        return {
            "dataset": self.spec.dataset,
            "digest": self.digest,
            "num_problems": self.num_problems,
            "num_samples": self.spec.num_samples,
            "sampling": self.spec.sampling.model_dump(),
        }


def load_benchmarks(
    spec: BaseTrainSpec, inputs: JobInputs, tokenizer: Any, verifier: Verifier
) -> tuple[TrainingBenchmark, ...]:
    """The benchmarks of a training.

    Raises:
        RunError: ``prompt_too_long``: ``max_length`` leaves no room for an answer; ``dataset_unavailable``.
        DatasetError, UnknownReferenceError: the data set, or a gold that is read as nothing.
    """
    found = []
    labels = benchmark_labels(spec.eval_benchmarks)
    for index, (label, ref) in enumerate(zip(labels, spec.eval_benchmarks, strict=True)):
        problems = load_problems(ref, data_root=inputs.data_root, cache_dir=inputs.cache_dir, limit=spec.eval_limit)
        check_golds(problems, verifier, pointer=f"/eval_benchmarks/{index}")
        tasks = make_tasks(problems, tokenizer, spec.prompt)
        evaluation = evaluation_spec(spec, ref, room=spec.max_length - len(longest_of(tasks).ids))
        check_room(tasks, evaluation.sampling.max_completion_length, spec.max_length, "max_length,")
        batch_size = BATCH_SIZES[evaluation.engine, default_device()]
        batches = tuple(lay_out(tasks, evaluation, batch_size))
        found.append(TrainingBenchmark(label, evaluation, batches, problems_digest(problems), len(problems)))
    return tuple(found)


def evaluation_spec(spec: BaseTrainSpec, dataset: str, *, room: int) -> EvaluateSpec:
    """The evaluation that a training asks for, sampled as the training samples where it does not say otherwise.

    Args:
        room: tokens that ``max_length`` leaves beside the longest prompt.
    """
    plain = SamplingSpec()
    own = {name: getattr(spec, name, getattr(plain, name)) for name in ("temperature", "top_p", "top_k")}
    longest = min(LONGEST_ANSWER, getattr(spec, "max_completion_length", None) or room)
    own["max_completion_length"] = max(1, min(room, longest))
    given = spec.eval_sampling.model_dump(exclude_none=True)
    return EvaluateSpec(
        model=spec.model,
        dataset=dataset,
        prompt=spec.prompt,
        sampling=SamplingSpec(**own | given),
        num_samples=spec.eval_num_samples,
        limit=spec.eval_limit,
        engine="vllm" if getattr(spec, "use_vllm", False) else "transformers",
    )


class PolicyEvaluation(TrainerCallback):
    """Evaluates the policy of the steps that the specification names. :meth:`attach` it to its trainer.

    Raises:
        LeftEarlyError: out of the trainer's ``train``.
    """

    def __init__(
        self,
        spec: BaseTrainSpec,
        benchmarks: Sequence[TrainingBenchmark],
        verifier: Verifier,
        records: RecordCallback,
        sink: Sink,
        stop: Stop,
    ) -> None:
        self._spec, self._benchmarks, self._verifier = spec, benchmarks, verifier
        self._records, self._sink, self._stop = records, sink, stop
        self._trainer: Any = None

    def attach(self, trainer: Any) -> None:
        """Sample from this trainer's policy; its :class:`RecordCallback` must come before this one."""
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self._is_due(state):
            self._evaluate(state)

    def on_step_end(self, args, state, control, **kwargs):
        # The last step's comes once it is logged and saved. Of a step that a run stops at, the next attempt finds that
        # it is due; inside a cycle of several updates it does not stop.
        last = state.global_step >= state.max_steps
        inside = is_inside_cycle(args, state)
        if last or (self._records.stopped and not inside) or not self._is_due(state):
            return
        started = time.monotonic()
        try:
            self._evaluate(state, may_leave=not inside)
        except LeftEarlyError:
            self._records.stopped = control.should_save = control.should_training_stop = True
        self._records.leave_out(time.monotonic() - started)

    def on_train_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps and self._is_due(state):
            self._evaluate(state)

    def _is_due(self, state) -> bool:
        is_wanted = self._spec.is_evaluated_at(state.global_step, state.max_steps)
        return is_wanted and self._trainer.run_state.evaluated_step != state.global_step

    def _evaluate(self, state, *, may_leave: bool = True) -> None:
        """Report the numbers of every benchmark as metrics of this step.

        Raises:
            LeftEarlyError: asked to leave in between, where it ``may_leave``.
        """
        watch = watch_and_leave(self._stop) if may_leave else None
        started, values = time.monotonic(), {}
        for benchmark in self._benchmarks:
            rows = self._rows(benchmark, state.global_step, watch)
            if state.is_world_process_zero:
                values |= benchmark_metrics(benchmark.label, summarise(rows, benchmark.spec))
        if state.is_world_process_zero:
            self._sink.emit(Metrics(state.global_step, values | {"time/evaluate": time.monotonic() - started}))
        self._trainer.run_state.evaluated_step = state.global_step

    def _rows(self, benchmark: TrainingBenchmark, step: int, watch: Watch | None) -> list[dict[str, Any]]:
        """The checked answers of all processes, which take the batches in turn."""
        accelerator, rows = self._trainer.accelerator, []
        total = benchmark.num_problems * benchmark.spec.num_samples
        for first in range(0, len(benchmark.batches), accelerator.num_processes):
            done = sum(len(batch.tasks) * batch.count for batch in benchmark.batches[:first])
            self._sink.emit(Progress("evaluate", done, total, {"benchmark": benchmark.label, "step": step}))
            # A rank without a batch samples nothing, but samples: weights in shards are gathered by all together.
            batch = next(iter(benchmark.batches[first + accelerator.process_index :]), _NOTHING)
            rows += self._answered(batch, benchmark.spec, watch)
        return ranks.gather_list(accelerator, rows)

    def _answered(self, batch: Batch, spec: EvaluateSpec, watch: Watch | None) -> list[dict[str, Any]]:
        sampling = spec.sampling
        groups = self._trainer.sample(
            batch.prompts,
            batch.count,
            seed=batch.seed,
            watch=watch,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_new_tokens=sampling.max_completion_length,
        )
        return judged(batch.answers(groups), spec, self._trainer.processing_class, self._verifier)


def benchmark_metrics(label: str, summary: dict[str, Any]) -> dict[str, float]:
    """The metrics of a summary of :func:`erpo_core.evaluation_summary.summarise`."""
    found = {name: summary[name]["value"] for name in ("acc", "fmt", "mean_length")} | {
        "truncated": summary["truncated"]
    }
    found |= {f"pass@{k}": interval["value"] for k, interval in summary["pass_at"].items() if k != "1"}
    return {f"eval/{label}/{name}": value for name, value in found.items()}
