"""From the trainer's callbacks to records: metrics, completions, traces, checkpoints, and the wish to stop."""

import math
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from erpo_core.checkpoints import checkpoint_folder, manifest_files
from erpo_core.generation.base import watch_and_leave
from erpo_core.job import Stop
from erpo_core.records import Checkpoint, Completions, Event, Metrics, Progress, Sink
from erpo_core.rewards.answers import has_answer
from erpo_core.trainer.ranks import total_of
from erpo_core.trainer.traces import trace_records

_IGNORED_METRICS = {"epoch", "step", "total_flos", "train_loss", "train_runtime", "step_time"}
_SUMMARY_STEPS = 10
_TELL_SECONDS = 5.0
_SILENT_SHARE, _SILENT_STEPS = 0.9, 20
"""erpo-spec section 4: with more silent buckets for that many steps ERPO runs as GRPO."""


class RecordCallback(TrainerCallback):
    """Reports each step to a sink. :meth:`attach` it to its trainer before training.

    Metrics are of all ranks. Of the answers themselves the first rank's share of a generation batch is kept.
    """

    def __init__(self, sink: Sink, stop: Stop, origin: dict[str, Any]) -> None:
        self.trainer = None
        self.last: dict[str, float] = {}
        self.tokens = 0
        self.stopped = False
        """Did somebody ask the training to leave before its end?"""
        self._recent: deque[dict[str, float]] = deque(maxlen=_SUMMARY_STEPS)
        self._skipped = 0
        self._silent = 0
        """Steps in a row whose progress was silent."""
        self._sink, self._stop, self._origin = sink, stop, origin
        self._started = time.monotonic()
        self._step_started = self._started
        self.first_step = 0
        """That this attempt began at."""
        self._growing = [0, 0]
        """Tokens and ended answers of the step at hand."""
        self._told = self._started

    def attach(self, trainer) -> None:
        """Take what the trainer keeps of its steps; only the first process reports, any may be asked to leave."""
        self.trainer = trainer
        trainer.keeps_rollouts, trainer.keeps_traces = trainer.is_world_process_zero(), True
        trainer.tell_removed = self._tell_removed
        trainer.watch = watch_and_leave(self._stop, self.watch if trainer.keeps_rollouts else None)

    def summary(self) -> dict[str, float]:
        """The mean of each metric over the last steps, where it was measured."""
        found = {}
        for name in {name for metrics in self._recent for name in metrics}:
            values = [metrics[name] for metrics in self._recent if name in metrics]
            finite = [value for value in values if isinstance(value, int | float) and value - value == 0]
            if finite:
                found[name] = sum(finite) / len(finite)
        return found

    def count_tokens(self, batches: list, logs: dict[str, float]) -> int:
        """Tokens of one step: those that were sampled, by all processes."""
        return round(logs.get("completions/sampled_tokens") or 0)

    def watch(self, tokens: int, ended: int) -> None:
        """An engine's :data:`~erpo_core.generation.base.Watch`: report, now and then, how far a step's answers are."""
        self._growing = [self._growing[0] + tokens, self._growing[1] + ended]
        if time.monotonic() - self._told > _TELL_SECONDS:
            state = self.trainer.state
            told = self._progress(state, self.last) if self.last else {}
            self._tell(state, told | dict(zip(("sampled_tokens", "sampled_answers"), self._growing, strict=True)))

    def _tell(self, state, data: dict[str, Any]) -> None:
        self._told = time.monotonic()
        self._sink.emit(Progress("train", state.global_step, state.max_steps, data))

    def leave_out(self, seconds: float) -> None:
        """Time that is no part of the step at hand."""
        self._step_started += seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self._started = self._step_started = time.monotonic()
        self.first_step = state.global_step
        self._skipped = self.trainer.run_state.skipped_steps
        self._recall(state.log_history)
        if state.is_world_process_zero and self.trainer.changed_environment:
            self._sink.emit(_environment_changed(self.trainer.changed_environment))

    def _recall(self, log_history: list[dict[str, float]]) -> None:
        """What earlier attempts have logged: the summary is of the whole run."""
        for logs in log_history:
            if "loss" in logs:
                self.tokens += self.count_tokens([], logs)
                self._recent.append(_metrics_of(logs))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        now = time.monotonic()
        seconds, self._step_started = now - self._step_started, now
        metrics = _metrics_of(logs)
        batches, self.trainer.rollout_log = self.trainer.rollout_log, []
        tokens = self.count_tokens(batches, logs)
        self.tokens += tokens
        metrics |= {"time/step": seconds, "tokens_per_second": tokens / seconds}
        metrics["memory/peak_bytes"] = _peak_bytes()
        self.last = metrics
        self._recent.append(metrics)
        self._sink.emit(Metrics(state.global_step, metrics))
        if batches:
            self._sink.emit(Completions(state.global_step, _completion_rows(batches, self.trainer.num_generations)))
        traces, self.trainer.traces = self.trainer.traces, []
        for trace in traces:
            for record in trace_records(trace, self.trainer, self._origin):
                self._sink.emit(record)
        self._report_skipped(state)
        self._report_silent(args, state, metrics)
        self._growing = [0, 0]
        self._tell(state, self._progress(state, metrics))

    def on_step_end(self, args, state, control, **kwargs):
        # The ranks are asked to leave at different moments, and must leave after the same step.
        if total_of(self.trainer.accelerator, [float(self._stop.requested)])[0]:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        folder = checkpoint_folder(Path(args.output_dir), state.global_step)
        reward = self.trainer.run_state.checkpoint_rewards.get(str(state.global_step), math.nan)
        data = {name: self.last.get(name) for name in ("entropy", "kl")}
        data["reward"] = reward if math.isfinite(reward) else None
        self._sink.emit(Checkpoint(state.global_step, str(folder), manifest_files(folder), data))

    def _tell_removed(self, step: int, folder: Path) -> None:
        message = f"the checkpoint of step {step} makes room for later ones"
        self._sink.emit(Event("checkpoint.removed", message, data={"step": step, "path": str(folder)}))

    def _report_skipped(self, state) -> None:
        skipped = self.trainer.run_state.skipped_steps
        if skipped > self._skipped:
            self._skipped = skipped
            message = f"step {state.global_step}: the gradient was not finite, no update"
            self._sink.emit(Event("step.skipped", message, "warn", {"step": state.global_step, "skipped": skipped}))

    def _report_silent(self, args, state, metrics: dict[str, float]) -> None:
        share = metrics.get("erpo/frac_silent_buckets") if getattr(args, "algorithm", None) == "erpo" else None
        self._silent = self._silent + 1 if share is not None and share > _SILENT_SHARE else 0
        if self._silent == _SILENT_STEPS:
            message = (
                f"step {state.global_step}: for {_SILENT_STEPS} steps the progress of more than {_SILENT_SHARE:.0%} of "
                "the buckets was no more than noise; ERPO is running as GRPO"
            )
            self._sink.emit(Event("erpo.silent", message, "warn", {"step": state.global_step, "share": share}))

    def _progress(self, state, metrics: dict[str, float]) -> dict[str, Any]:
        done = max(1, state.global_step - self.first_step)
        elapsed = time.monotonic() - self._started
        return {
            "reward": metrics.get("reward"),
            "entropy": metrics.get("entropy"),
            "tokens_per_second": metrics["tokens_per_second"],
            "eta_seconds": elapsed / done * (state.max_steps - state.global_step),
        }


def _metrics_of(logs: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in logs.items() if name not in _IGNORED_METRICS}


def _environment_changed(changed: dict[str, tuple[Any, Any]]) -> Event:
    told = ", ".join(f"{name} {before or 'absent'} -> {now or 'absent'}" for name, (before, now) in changed.items())
    message = f"resumed in another environment than the checkpoint's, so not to the last bit: {told}"
    data = {name: {"before": before, "now": now} for name, (before, now) in changed.items()}
    return Event("resume.environment_changed", message, "warn", data)


def _completion_rows(batches: list, group_size: int) -> list[dict[str, Any]]:
    rows = []
    for batch in batches:
        scored = batch.last_scored
        advantages = scored.signals.group_advantages.tolist() if scored else [None] * len(batch.examples)
        for index, example in enumerate(batch.examples):
            group, sample = divmod(batch.first_row + index, group_size)
            rewards = {name: float(values[index]) for name, values in batch.reward_rows.items()}
            rows.append(
                {
                    "prompt_id": str(example.get("prompt_id", f"group-{group}")),
                    "group": group,
                    "sample": sample,
                    "prompt": example.get("problem") or str(example["prompt"]),
                    "completion": batch.completions[index],
                    "gold": example.get("answer"),
                    "rewards": rewards,
                    "reward": float(batch.rewards[index]),
                    "advantage": advantages[index],
                    "verdict": batch.verdicts[index] if batch.verdicts else None,
                    "boxed": has_answer(batch.completions[index]),
                    "truncated": not bool(batch.finished[index]),
                    "num_tokens": batch.lengths[index],
                    "extra": {name: _plain(value) for name, value in batch.extras[index].items()},
                }
            )
    return rows


def _plain(value: Any) -> Any:
    """As JSON has it; a scalar of torch or numpy as its number, anything else as text."""
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
