"""Engines that sample from the policy as it is now."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erpo_core.errors import RunError
from erpo_core.generation.adapters import digest_of, scaled_pairs
from erpo_core.generation.base import Engine
from erpo_core.generation.snapshot import PolicySnapshot
from erpo_core.generation.transformers import TransformersEngine


def make_sampler(args: Any, policy: Any, tokenizer: Any, *, num_processes: int = 1) -> Callable[[Any], Engine]:
    """A function that gives, for the policy, an engine with its current weights.

    Raises:
        ValueError: ``use_vllm`` with a policy that vLLM cannot follow, by name.
        RunError: ``engine_unavailable``.
    """
    if not args.use_vllm:
        return TransformersSampler(policy, tokenizer)
    _check_policy(policy, num_processes)
    from erpo_core.generation.vllm import VLLMEngine

    dtype = torch.bfloat16 if args.bf16 else policy.dtype
    config = policy.config
    engine = VLLMEngine(
        config._name_or_path,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=args.vllm_max_model_length or config.max_position_embeddings,
        max_lora_rank=policy.peft_config["default"].r,
        logps=True,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
    )
    return VLLMSampler(engine, dtype, Path(args.output_dir) / ".vllm-adapters")


class TransformersSampler:
    """The policy itself; on a CPU a copy of it that decodes faster, where there is one that samples the same."""

    def __init__(self, policy: Any, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._snapshot = PolicySnapshot(policy) if PolicySnapshot.suits(policy) else None

    def __call__(self, policy: Any) -> Engine:
        """The engine, at the policy's version."""
        if self._snapshot is None:
            return TransformersEngine(policy, self._tokenizer)
        self._snapshot.refresh()
        return TransformersEngine(self._snapshot.model, self._tokenizer)


class VLLMSampler:
    """Keeps a vLLM engine at the policy's adapter. The base weights never move: what the engine gets is the adapter.

    Each version goes through a folder of its own, and what the engine then holds is compared with the policy, tensor by
    tensor: an engine that samples from another version ends the run.
    """

    def __init__(self, engine: Any, dtype: torch.dtype, folder: Path) -> None:
        self.engine = engine
        self._dtype = dtype
        self._folder = folder
        self._version = 0
        self._sent: str | None = None
        shutil.rmtree(folder, ignore_errors=True)

    def __call__(self, policy: Any) -> Engine:
        """The engine, at the policy's version.

        Raises:
            RunError: ``stale_adapter``: the engine holds another adapter than the policy's; ``adapter_unsupported``.
        """
        expected = policy_digest(policy, self._dtype)
        if expected != self._sent:
            self._send(policy)
            self._sent = expected
        if self.engine.adapter_digest() != expected:
            raise RunError(
                f"vLLM does not hold version {self._version} of the adapter, which it was sent: answers would come "
                "from another policy than the one that is trained",
                code="stale_adapter",
            )
        return self.engine

    def _send(self, policy: Any) -> None:
        previous = self._folder / f"version-{self._version}"
        self._version += 1
        current = self._folder / f"version-{self._version}"
        policy.save_pretrained(current, selected_adapters=["default"], save_embedding_layers=False)
        self.engine.load_adapter(current)
        shutil.rmtree(previous, ignore_errors=True)


def policy_digest(policy: Any, dtype: torch.dtype) -> str:
    """Digest of the adapter ``default`` as an engine of this dtype holds it."""
    return digest_of(scaled_pairs(_pairs(policy), dtype))


def _pairs(policy: Any) -> Iterator[tuple[Tensor, Tensor, float]]:
    from peft.tuners.lora import LoraLayer

    for module in policy.modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            yield module.lora_A["default"].weight, module.lora_B["default"].weight, module.scaling["default"]


def _check_policy(policy: Any, num_processes: int) -> None:
    from peft import PeftModel

    if not isinstance(policy, PeftModel):
        raise ValueError("use_vllm: vLLM is sent LoRA adapters, not whole weights; give a peft_config")
    if not policy.config._name_or_path:
        raise ValueError("use_vllm: vLLM loads the base by its name; load the model with from_pretrained")
    if num_processes > 1:
        raise ValueError("use_vllm: not with several processes yet; set it to False")
