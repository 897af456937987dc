"""One training job: from a specification to records."""

import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from erpo_core.data.formats import Problem, problems_digest
from erpo_core.data.golds import check_golds
from erpo_core.job import JobInputs, LeftEarlyError, Stop, leaves_early
from erpo_core.memory import SMALL_MODEL, count_parameters, rows_of_micro_batch
from erpo_core.models import load_policy, prepare_model
from erpo_core.records import Progress, Result, Sink
from erpo_core.resolved import report_resolved
from erpo_core.rewards.functions import judge_answers, reward_functions
from erpo_core.rewards.verify import Verifier
from erpo_core.specs.train import BaseTrainSpec, ErpoTrainSpec, GrpoTrainSpec
from erpo_core.trainer.callbacks import RecordCallback
from erpo_core.trainer.config import ERPOConfig
from erpo_core.trainer.data import load_training_problems, make_dataset, report_dropped, with_completion_length
from erpo_core.trainer.environment import environment
from erpo_core.trainer.evaluating import PolicyEvaluation, TrainingBenchmark, load_benchmarks
from erpo_core.trainer.preflight import run_preflight
from erpo_core.trainer.trainer import ERPOTrainer

PASSED_THROUGH = (
    "advantage_clip",
    "algorithm",
    "beta",
    "dead_group_on",
    "dynamic_sampling",
    "epsilon",
    "epsilon_high",
    "generation_batch_size",
    "gradient_checkpointing",
    "learning_rate",
    "loss_type",
    "lr_scheduler_type",
    "max_completion_length",
    "max_grad_norm",
    "max_resample_rounds",
    "max_skipped_steps",
    "max_steps",
    "num_generations",
    "num_iterations",
    "num_train_epochs",
    "outcome_reward",
    "save_steps",
    "save_total_limit",
    "scoring_dtype",
    "seed",
    "temperature",
    "top_entropy_quantile",
    "top_k",
    "top_p",
    "trace_every",
    "trace_groups",
    "use_vllm",
    "vllm_gpu_memory_utilization",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_mode",
    "vllm_server_base_url",
    "warmup_steps",
    "weight_decay",
)
"""Fields that mean the same in TrainSpec and ERPOConfig."""
ERPO_ONLY = tuple(sorted(set(ErpoTrainSpec.model_fields) - set(GrpoTrainSpec.model_fields)))
"""Fields of the algorithm ERPO alone; they pass through as well."""
MOST_CHECKERS = 4
"""Processes that check answers: each holds 55 MB, and starts only where the others are busy."""
_PATIENCE = timedelta(days=1)
"""That processes have with each other: all wait while the first one fetches a model or writes a checkpoint, and
torch's ten minutes are too few for large ones. A process that fails or is gone ends the job without them."""


@leaves_early
def run_training(spec: GrpoTrainSpec, inputs: JobInputs, sink: Sink, stop: Stop) -> dict[str, Any]:
    """Train and report. Returns the summary, or ``{"stopped": True}`` where it was asked to leave.

    Raises:
        DatasetError: no problem is short enough, or a gold is read as nothing.
        RunError: see its codes.
    """
    sink.emit(Progress("load", 0, 1))
    with first_process_first():
        path = prepare_model(inputs.model.base, cache_dir=inputs.cache_dir, model_roots=inputs.model_roots)
    model, tokenizer, info = load_policy(
        inputs, dtype=_load_dtype(spec, path), trainable=True, load_in_4bit=spec.load_in_4bit
    )
    problems = load_training_problems(spec, inputs, sink)
    dataset, dropped = make_dataset(tokenizer, problems, spec)
    report_dropped(sink, dropped, len(problems), "are too long")
    spec = with_completion_length(spec, dataset)
    args = make_config(spec, inputs.work_dir / "checkpoints", bf16=wants_bf16(spec))
    with Verifier(processes=min(MOST_CHECKERS, os.cpu_count() or 1)) as verifier, ExitStack() as at_the_end:
        functions = reward_functions(spec.rewards, verifier)
        if inputs.resume_from is None and judge_answers(spec.rewards):
            check_golds(problems, verifier)
        origin = {name: info[name] for name in ("model_digest", "adapter_digest", "tokenizer_digest", "dtype")}
        records = RecordCallback(sink, stop, origin | {"head_dtype": "float32"})
        benchmarks = load_benchmarks(spec, inputs, tokenizer, verifier)
        evaluation = PolicyEvaluation(spec, benchmarks, verifier, records, sink, stop)
        trainer = ERPOTrainer(
            model=model,
            reward_funcs=functions,
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[records, evaluation],
            peft_config=None if inputs.model.adapter_path else lora_config(spec),
        )
        at_the_end.callback(trainer.close)
        records.attach(trainer)
        evaluation.attach(trainer)
        own = {field.name for field in fields(ERPOConfig)} & (set(PASSED_THROUGH) | set(ERPO_ONLY))
        config = {name: getattr(args, name) for name in sorted(own)}
        report_resolved(sink, inputs, described(spec, config, info, problems, dataset, benchmarks))
        if spec.preflight and inputs.resume_from is None:
            run_preflight(trainer, sink, stop)
        return train_to_end(trainer, records, inputs, sink)


def train_to_end(trainer: Any, records: RecordCallback, inputs: JobInputs, sink: Sink) -> dict[str, Any]:
    """Train, and emit the summary of the whole run, all attempts together, as the result.

    Raises:
        LeftEarlyError: asked to leave. Every step that was made is in a checkpoint.
    """
    try:
        trainer.train(resume_from_checkpoint=str(inputs.resume_from) if inputs.resume_from else None)
    except LeftEarlyError:
        if trainer.state.global_step > records.first_step:
            trainer.save_now()
        raise
    state = trainer.state
    if records.stopped and state.global_step < state.max_steps:
        raise LeftEarlyError
    losses = [logs["loss"] for logs in state.log_history if math.isfinite(logs.get("loss", math.nan))]
    summary = {
        "steps": state.global_step,
        "tokens": records.tokens,
        "seconds": trainer.count_seconds(),
        "train_loss": sum(losses) / len(losses) if losses else None,
        "final": records.summary(),
    }
    sink.emit(Result(summary))
    return summary


def make_config(spec: GrpoTrainSpec, output_dir: Path, *, bf16: bool) -> ERPOConfig:
    """The trainer's configuration of a specification; per-device sizes are derived."""
    values = {name: getattr(spec, name) for name in PASSED_THROUGH}
    if isinstance(spec, ErpoTrainSpec):
        values |= {name: getattr(spec, name) for name in ERPO_ONLY}
    share = spec.generation_batch_size // max(1, spec.hardware.num_gpus)
    size = rows_of_micro_batch(spec, on_cuda=torch.cuda.is_available())
    args = ERPOConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=share // size,
        reward_weights=[reward.weight for reward in spec.rewards],
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        save_strategy="steps",
        dataloader_pin_memory=False,
        vllm_max_model_length=spec.max_length,
        **values,
    )
    use_one_device(args)
    return args


def use_one_device(args: TrainingArguments) -> None:
    """Train on one GPU, of however many the process sees: transformers would copy the model to each for every batch,
    and TRL refuses that. Several devices have a process each."""
    args._n_gpu = min(1, args.n_gpu)


def first_process_first() -> AbstractContextManager[None]:
    """Where several processes train, each on its own device, the first one does this before the others."""
    from accelerate import PartialState

    on_gpu = torch.cuda.is_available()
    if on_gpu and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return PartialState(cpu=not on_gpu, timeout=_PATIENCE).main_process_first()


def wants_bf16(spec: BaseTrainSpec) -> bool:
    """By default on CUDA, and where scoring is to be in bfloat16."""
    default = torch.cuda.is_available() or getattr(spec, "scoring_dtype", None) == "bfloat16"
    return default if spec.bf16 is None else spec.bf16


def _load_dtype(spec: GrpoTrainSpec, folder: Path) -> torch.dtype:
    """bfloat16 only where it is wanted, the weights are frozen, and scoring may be rounded (erpo-spec section 4)."""
    scoring = spec.scoring_dtype
    if scoring == "auto":
        small = not torch.cuda.is_available() or count_parameters(folder) <= SMALL_MODEL
        scoring = "float32" if small else "bfloat16"
    rounded = wants_bf16(spec) and scoring == "bfloat16" and spec.lora is not None
    return torch.bfloat16 if rounded else torch.float32


def lora_config(spec: BaseTrainSpec):
    """PEFT's configuration, or None where every weight is trained."""
    if spec.lora is None:
        return None
    from peft import LoraConfig

    targets = spec.lora.target_modules
    return LoraConfig(
        r=spec.lora.r,
        lora_alpha=spec.lora.lora_alpha,
        lora_dropout=spec.lora.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )


def described(
    spec: BaseTrainSpec,
    config: dict[str, Any],
    info: dict[str, Any],
    problems: list[Problem],
    dataset,
    benchmarks: Sequence[TrainingBenchmark],
) -> dict[str, Any]:
    """What a training's names turned out to be, for its ``resolved`` record."""
    return {
        "config": config,
        "model": info,
        "dataset": {"ref": spec.dataset, "digest": problems_digest(problems), "num_problems": len(dataset)},
        "evaluations": {benchmark.label: benchmark.described() for benchmark in benchmarks},
        "seed": spec.seed,
        **environment(),
    }
