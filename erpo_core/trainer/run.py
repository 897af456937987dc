"""One training job: from a specification to records."""

import math
import platform
import time
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from erpo_core.data.datasets import load_problems
from erpo_core.data.formats import Problem, problems_digest
from erpo_core.errors import DatasetError, RunError
from erpo_core.job import JobInputs, Stop
from erpo_core.models import load_policy, prepare_model
from erpo_core.prompts import prompt_ids, prompt_messages, prompt_text
from erpo_core.records import Event, Progress, Resolved, Result, Sink
from erpo_core.rewards.functions import reward_functions
from erpo_core.rewards.verify import Verifier
from erpo_core.specs.train import ErpoTrainSpec, GrpoTrainSpec
from erpo_core.trainer.callbacks import RecordCallback, verify_checkpoint
from erpo_core.trainer.config import ERPOConfig
from erpo_core.trainer.trainer import SMALL_MODEL, ERPOTrainer

PASSED_THROUGH = (
    "advantage_clip",
    "algorithm",
    "beta",
    "epsilon",
    "epsilon_high",
    "generation_batch_size",
    "gradient_checkpointing",
    "learning_rate",
    "loss_type",
    "lr_scheduler_type",
    "max_completion_length",
    "max_grad_norm",
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
    "top_k",
    "top_p",
    "trace_every",
    "trace_groups",
    "use_vllm",
    "vllm_gpu_memory_utilization",
    "vllm_mode",
    "warmup_steps",
    "weight_decay",
)
"""Fields that mean the same in TrainSpec and ERPOConfig."""
ERPO_ONLY = tuple(sorted(set(ErpoTrainSpec.model_fields) - set(GrpoTrainSpec.model_fields)))
"""Fields of the algorithm ERPO alone; they pass through as well."""
_VERSIONS = ("torch", "transformers", "trl", "peft", "accelerate")


def run_training(spec: GrpoTrainSpec, inputs: JobInputs, sink: Sink, stop: Stop) -> dict[str, Any]:
    """Train and report. Returns the summary; ``stopped`` is true where ``stop`` ended it early, after a checkpoint.

    Raises:
        DatasetError: no problem is short enough.
        RunError: see its codes.
    """
    started = time.monotonic()
    sink.emit(Progress("load", 0, 1))
    path = prepare_model(inputs.model.base, cache_dir=inputs.cache_dir, model_roots=inputs.model_roots)
    model, tokenizer, info = load_policy(inputs, dtype=_load_dtype(spec, path), trainable=True)
    problems = load_problems(spec.dataset, data_root=inputs.data_root, cache_dir=inputs.cache_dir)
    dataset, dropped = make_dataset(tokenizer, problems, spec)
    if dropped:
        message = f"{dropped} of {len(problems)} problems are too long and are left out"
        sink.emit(Event("dataset.dropped", message, "warn", {"dropped": dropped, "total": len(problems)}))
    args = make_config(spec, inputs.work_dir / "trainer", bf16=_wants_bf16(spec))
    with Verifier() as verifier:
        functions = reward_functions(spec.rewards, verifier)
        accuracy = next((f for f in functions if hasattr(f, "last_verdicts")), None)
        origin = {name: info[name] for name in ("model_digest", "adapter_digest", "tokenizer_digest", "dtype")}
        records = RecordCallback(
            sink, stop, accuracy, inputs.work_dir / "checkpoints", origin | {"head_dtype": "float32"}
        )
        trainer = ERPOTrainer(
            model=model,
            reward_funcs=functions,
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[records],
            peft_config=None if inputs.model.adapter_path else _lora(spec),
        )
        records.attach(trainer)
        sink.emit(Resolved(_resolved(spec, args, info, problems, dataset)))
        output = trainer.train(resume_from_checkpoint=_resume_from(inputs))
    done = trainer.state.global_step
    summary = {
        "steps": done,
        "stopped": stop.requested and done < trainer.state.max_steps,
        "tokens": records.tokens,
        "seconds": time.monotonic() - started,
        "train_loss": output.training_loss,
        "final": records.summary(),
    }
    sink.emit(Result(summary))
    return summary


def make_dataset(tokenizer, problems: list[Problem], spec: GrpoTrainSpec):
    """Rows of ``prompt`` (chat turns, or text), ``prompt_ids`` (what the model reads: as in an evaluation), ``answer``,
    ``problem``, ``prompt_id``; and how many were too long.

    Raises:
        DatasetError: none is short enough.
    """
    from datasets import Dataset

    room = spec.max_length - spec.max_completion_length
    chat = spec.prompt.template != "raw" and tokenizer.chat_template is not None
    rows = []
    for problem in problems:
        ids = prompt_ids(tokenizer, problem.problem, spec.prompt)
        if len(ids) > room:
            continue
        render = prompt_messages(problem.problem, spec.prompt) if chat else None
        prompt = render or prompt_text(tokenizer, problem.problem, spec.prompt)
        row = {"prompt": prompt, "prompt_ids": ids, "answer": problem.answer, "problem": problem.problem}
        rows.append(row | {"prompt_id": str(problem.id)})
    if not rows:
        raise DatasetError(
            f"every prompt is longer than {room} tokens", mend="raise max_length or lower max_completion_length"
        )
    groups = spec.generation_batch_size // spec.num_generations
    if len(rows) < groups:
        raise DatasetError(
            f"a step needs {groups} problems and the data set has {len(rows)}",
            mend="lower generation_batch_size or give more problems",
        )
    return Dataset.from_list(rows), len(problems) - len(rows)


def make_config(spec: GrpoTrainSpec, output_dir: Path, *, bf16: bool) -> ERPOConfig:
    """The trainer's configuration of a specification; per-device sizes are derived."""
    values = {name: getattr(spec, name) for name in PASSED_THROUGH}
    if isinstance(spec, ErpoTrainSpec):
        values |= {name: getattr(spec, name) for name in ERPO_ONLY}
    # On a GPU one group a micro-batch bounds the memory; on a CPU one micro-batch wastes the least time.
    size = spec.num_generations if torch.cuda.is_available() else spec.generation_batch_size
    accumulation = spec.generation_batch_size // size
    return ERPOConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        reward_weights=[reward.weight for reward in spec.rewards],
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        save_strategy="steps",
        dataloader_pin_memory=False,
        vllm_max_model_length=spec.max_length,
        **values,
    )


def _wants_bf16(spec: GrpoTrainSpec) -> bool:
    return torch.cuda.is_available() if spec.bf16 is None else spec.bf16


def _load_dtype(spec: GrpoTrainSpec, folder: Path) -> torch.dtype:
    """bfloat16 only where it is wanted, the weights are frozen, and scoring may be rounded (erpo-spec section 4)."""
    scoring = spec.scoring_dtype
    if scoring == "auto":
        small = not torch.cuda.is_available() or _num_parameters(folder) <= SMALL_MODEL
        scoring = "float32" if small else "bfloat16"
    rounded = _wants_bf16(spec) and scoring == "bfloat16" and spec.lora is not None
    return torch.bfloat16 if rounded else torch.float32


def _num_parameters(folder: Path) -> int:
    """By the headers of its safetensors files."""
    from safetensors import safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


def _lora(spec: GrpoTrainSpec):
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


def _resume_from(inputs: JobInputs) -> str | None:
    if inputs.resume_from is None:
        return None
    if not verify_checkpoint(inputs.resume_from):
        raise RunError(f"the checkpoint {inputs.resume_from.name} is damaged", code="checkpoint_damaged")
    return str(inputs.resume_from)


def _resolved(spec: GrpoTrainSpec, args: ERPOConfig, info: dict[str, Any], problems: list[Problem], dataset) -> dict:
    own = {field.name for field in fields(ERPOConfig)} & (set(PASSED_THROUGH) | set(ERPO_ONLY))
    return {
        "config": {name: getattr(args, name) for name in sorted(own)},
        "model": info,
        "dataset": {"ref": spec.dataset, "digest": problems_digest(problems), "num_problems": len(dataset)},
        "versions": {name: version(name) for name in _VERSIONS} | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "num_threads": torch.get_num_threads(),
        "seed": spec.seed,
    }
