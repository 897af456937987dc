"""Supervised fine-tuning on worked solutions: TRL's SFTTrainer with the records and checkpoints of the others."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from erpo_core.generation.base import Sample, Watch
from erpo_core.job import JobInputs, Stop, leaves_early
from erpo_core.memory import rows_of_micro_batch
from erpo_core.models import load_policy, prepare_model, widen_adapters
from erpo_core.prompts import stop_token_ids
from erpo_core.records import Progress, Sink
from erpo_core.resolved import report_resolved
from erpo_core.rewards.verify import Verifier
from erpo_core.specs.train import SftTrainSpec
from erpo_core.trainer import ranks
from erpo_core.trainer.callbacks import RecordCallback
from erpo_core.trainer.data import load_training_problems, make_solution_dataset, report_dropped
from erpo_core.trainer.evaluating import PolicyEvaluation, load_benchmarks
from erpo_core.trainer.guards import SkipNonFinite
from erpo_core.trainer.run import described, first_process_first, lora_config, train_to_end, use_one_device, wants_bf16
from erpo_core.trainer.sampling import TransformersSampler
from erpo_core.trainer.saving import RotateCheckpoints, WholeCheckpoints
from erpo_core.trainer.sharding import ShardedWeights
from erpo_core.trainer.state import RunState
from erpo_core.trainer.zero import ZeroParts, take_configuration

PASSED_THROUGH = (
    "gradient_checkpointing",
    "learning_rate",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_length",
    "max_skipped_steps",
    "max_steps",
    "num_train_epochs",
    "save_steps",
    "save_total_limit",
    "seed",
    "warmup_steps",
    "weight_decay",
)
"""Fields that mean the same in SftTrainSpec and SolutionConfig."""


@dataclass
class SolutionConfig(SFTConfig):
    """TRL's, with our guard against gradients that are not finite."""

    max_skipped_steps: int = field(default=10, metadata={"help": "Steps with a non-finite gradient before it fails."})

    def __post_init__(self) -> None:
        super().__post_init__()
        take_configuration(self)  # TRL would train adapters in bfloat16 where it sees ZeRO-3


class _NoReference:
    """Nothing is compared with the weights that training started from."""

    def fingerprint(self, policy: Any) -> str:
        return ""

    def shard(self, shard: Callable[[Any], Any]) -> None:
        pass


class SolutionTrainer(ShardedWeights, ZeroParts, WholeCheckpoints, SFTTrainer):
    """TRL's, with what :class:`RecordCallback` and :class:`SkipNonFinite` read of a trainer."""

    def __init__(self, *args, **kwargs) -> None:
        self.run_state = RunState()
        self._reference = _NoReference()
        self.keeps_rollouts = False
        self.rollout_log: list[Any] = []
        self.traces: list[Any] = []
        super().__init__(*args, **kwargs)
        widen_adapters(self._policy)
        self._guard = SkipNonFinite(self)
        self.add_callback(self._guard)
        self.add_callback(RotateCheckpoints(self))
        self._engine_of = TransformersSampler(self.processing_class)

    def sample(
        self, prompts: list[list[int]], n: int, *, seed: int, watch: Watch | None = None, **sampling: float
    ) -> list[list[Sample]]:
        """As :meth:`erpo_core.trainer.rollouts.SampledAnswers.sample`."""
        with self.accelerator.autocast() if self.args.bf16 else nullcontext():
            engine = self._engine_of(self._policy)
            stop_ids = stop_token_ids(self.processing_class, self._policy)
            call = {"n": n, "stop_ids": stop_ids, "seed": seed, **sampling}
            return ranks.sampled_together(self.accelerator, engine, watch, prompts, **call)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """TRL's, with a look at the gradients of a step before they are clipped."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._guard.look()
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the count of skipped steps."""
        self._guard.keep_sums_finite(logs)
        self._metrics["train"]["erpo/skipped_steps"] = [self.run_state.skipped_steps]
        super().log(logs, start_time)

    @property
    def _policy(self):
        return self.accelerator.unwrap_model(self.model)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            # TRL counts the tokens from 0 again.
            counts = [entry["num_tokens"] for entry in self.state.log_history if "num_tokens" in entry]
            self._total_train_tokens = counts[-1] if counts else 0


class SolutionRecords(RecordCallback):
    """Counts the tokens that were read: nothing is sampled."""

    _counted = 0

    def count_tokens(self, batches: list, logs: dict[str, float]) -> int:
        """Of the prompts and solutions of one step."""
        before, self._counted = self._counted, int(logs["num_tokens"])
        return self._counted - before


@leaves_early
def run_sft(spec: SftTrainSpec, inputs: JobInputs, sink: Sink, stop: Stop) -> dict[str, Any]:
    """Train on solutions and report. Returns the summary, as :func:`erpo_core.trainer.run.run_training` does.

    Raises:
        DatasetError: no problem has a solution, or none is short enough.
        RunError: see its codes.
    """
    sink.emit(Progress("load", 0, 1))
    with first_process_first():
        prepare_model(inputs.model.base, cache_dir=inputs.cache_dir, model_roots=inputs.model_roots)
    rounded = wants_bf16(spec) and spec.lora is not None
    dtype = torch.bfloat16 if rounded else torch.float32
    model, tokenizer, info = load_policy(inputs, dtype=dtype, trainable=True, load_in_4bit=spec.load_in_4bit)
    problems = load_training_problems(spec, inputs, sink)
    dataset, dropped = make_solution_dataset(tokenizer, problems, spec, stop_token_ids(tokenizer, model))
    report_dropped(sink, dropped, len(dataset) + dropped, "are too long with their solution")
    args = make_sft_config(spec, inputs.work_dir / "checkpoints", bf16=wants_bf16(spec))
    records = SolutionRecords(sink, stop, {})
    with Verifier() as verifier:
        benchmarks = load_benchmarks(spec, inputs, tokenizer, verifier)
        evaluation = PolicyEvaluation(spec, benchmarks, verifier, records, sink, stop)
        trainer = SolutionTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[records, evaluation],
            peft_config=None if inputs.model.adapter_path else lora_config(spec),
        )
        records.attach(trainer)
        evaluation.attach(trainer)
        config = {name: getattr(args, name) for name in PASSED_THROUGH}
        report_resolved(sink, inputs, described(spec, config, info, problems, dataset, benchmarks))
        return train_to_end(trainer, records, inputs, sink)


def make_sft_config(spec: SftTrainSpec, output_dir: Path, *, bf16: bool) -> SolutionConfig:
    """The trainer's configuration of a specification; per-device sizes are derived."""
    on_gpu = torch.cuda.is_available()
    share = spec.train_batch_size // max(1, spec.hardware.num_gpus)
    size = rows_of_micro_batch(spec, on_cuda=on_gpu)
    args = SolutionConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=share // size,
        bf16=bf16,
        use_cpu=not on_gpu,
        disable_tqdm=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        save_strategy="steps",
        dataloader_pin_memory=False,
        **{name: getattr(spec, name) for name in PASSED_THROUGH},
    )
    use_one_device(args)
    return args
