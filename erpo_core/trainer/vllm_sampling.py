"""vLLM as the sampler of a training: what it holds is kept at the policy, and shown to be it."""

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from torch import Tensor

from erpo_core.errors import RunError
from erpo_core.generation.adapters import digest_of, scaled_pairs
from erpo_core.generation.base import Engine
from erpo_core.models import context_length
from erpo_core.trainer.probe import Probe
from erpo_core.trainer.reference import adapted_by, fingerprint_of
from erpo_core.trainer.sampling import Sampler
from erpo_core.trainer.sharding import is_sharded, whole, whole_weights

_PROBE = "A train leaves at 9:40 and arrives at 13:15. How long does it take? It takes 3 hours and 35 minutes.\n"
_UNKNOWN_TO_VLLM = ("alpha_pattern", "lora_bias", "rank_pattern")
"""Of PEFT's LoraConfig; vLLM reads an adapter that has them, and samples from another policy."""


def make_vllm_sampler(args: Any, policy: Any, tokenizer: Any, accelerator: Accelerator) -> Sampler:
    """The sampler that the arguments ask for.

    Raises:
        ValueError: ``use_vllm`` with a policy that vLLM cannot follow, by name.
        RunError: ``engine_unavailable``.
    """
    _check_policy(policy, args.vllm_mode)
    folder = Path(args.output_dir) / ".vllm-adapters"
    probe = tokenizer(_PROBE)["input_ids"]
    if args.vllm_mode == "server":
        from erpo_core.generation.vllm_server import VLLMServer

        url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        server = VLLMServer(url, logps=True, timeout=args.vllm_server_timeout)
        return ServerSampler(server, folder, accelerator, probe)
    from erpo_core.generation.vllm import VLLMEngine

    dtype = torch.bfloat16 if args.bf16 else policy.dtype
    is_adapter = isinstance(policy, PeftModel)
    engine = VLLMEngine(
        policy.config._name_or_path,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=args.vllm_max_model_length or context_length(policy.config),
        max_lora_rank=policy.peft_config["default"].r if is_adapter else None,
        logps=True,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
    )
    if is_adapter:
        return AdapterSampler(engine, dtype, folder / f"rank-{accelerator.process_index}", probe)
    return WeightsSampler(engine, dtype, folder, accelerator, probe)


class AdapterSampler:
    """Keeps a vLLM engine at the policy's adapter. The base weights never move: what the engine gets is the adapter.

    Each version goes through a folder of its own, and what the engine then holds is compared with the policy, tensor by
    tensor: an engine that samples from another version ends the run. The base it has loaded by its name: before the
    first adapter, its log-probabilities of a fixed text are compared with those of the policy's base.
    """

    def __init__(self, engine: Any, dtype: torch.dtype, folder: Path, probe: list[int]) -> None:
        self.engine = engine
        self._dtype = dtype
        self._folders = VersionFolders(folder)
        self._probe = Probe(engine, probe)
        self._sent: str | None = None

    def __call__(self, policy: Any) -> Engine:
        """The engine, at the policy's version.

        Raises:
            RunError: ``stale_adapter``: the engine holds another adapter than the policy's, or another base;
                ``adapter_unsupported``.
        """
        if not self._folders.version:
            with adapted_by(policy, None):
                self._probe.check(
                    policy,
                    f"the base model, which it has loaded from {policy.config._name_or_path}",
                    "weights that were changed in memory (an adapter merged into them, say) must be saved, and the "
                    "model loaded from there",
                )
        expected = policy_digest(policy, self._dtype)
        if expected != self._sent:
            with self._folders.next() as folder:
                write_adapter(policy, folder)
                self.engine.load_adapter(folder)
            self._sent = expected
        if self.engine.adapter_digest() != expected:
            raise RunError(
                f"vLLM does not hold version {self._folders.version} of the adapter, which it was sent: answers would "
                "come from another policy than the one that is trained",
                code="stale_adapter",
            )
        return self.engine

    def close(self) -> None:
        """Remove the adapter's folder; the engine ends with its process."""
        self._sent = None
        self._folders.remove()


class WeightsSampler:
    """Keeps vLLM engines at a policy that is trained whole: the first rank writes its weights, all ranks read them.

    vLLM fuses and packs what it reads, so that tensors cannot be compared; log-probabilities of a fixed text are.
    """

    def __init__(
        self, engine: Any, dtype: torch.dtype, folder: Path, accelerator: Accelerator, probe: list[int]
    ) -> None:
        self.engine = engine
        self._dtype = dtype
        self._accelerator = accelerator
        self._folders = VersionFolders(folder)
        self._probe = Probe(engine, probe)
        accelerator.wait_for_everyone()  # all have emptied the folder before the first one writes
        self._sent: str | None = None

    def __call__(self, policy: Any) -> Engine:
        """The engine, at the policy's version.

        Raises:
            RunError: ``stale_adapter``: the engine's log-probabilities are not the policy's.
        """
        version = fingerprint_of(policy, lambda parameter: parameter.requires_grad)
        if version != self._sent:
            with self._folders.next() as folder:
                write_weights(policy, folder, self._dtype, keep=self._accelerator.is_main_process)
                self._accelerator.wait_for_everyone()
                self.engine.load_weights(folder)
                self._accelerator.wait_for_everyone()
            self._probe.check(policy, f"version {self._folders.version} of the weights, which it was sent")
            self._sent = version
        return self.engine

    def close(self) -> None:
        """Remove the weights' folder; the engine ends with its process."""
        self._sent = None
        if self._accelerator.is_main_process:
            self._folders.remove()


class ServerSampler:
    """Keeps a vLLM server at the policy's adapter: the first rank sends it, all ranks sample.

    A server does not say what it holds. What it must say right are the log-probabilities of a fixed text.
    """

    def __init__(self, server: Any, folder: Path, accelerator: Accelerator, probe: list[int]) -> None:
        self.engine = server
        self._accelerator = accelerator
        self._folders = VersionFolders(folder)
        self._probe = Probe(server, probe)
        self._run = broadcast_object_list([uuid.uuid4().hex[:12]])[0]
        self._held: str | None = None
        """The adapter that this process, the first one, has to have forgotten."""
        accelerator.wait_for_everyone()  # all have emptied the folder before the first one writes
        self._sent: str | None = None

    def __call__(self, policy: Any) -> Engine:
        """The server, at the policy's version.

        Raises:
            RunError: ``stale_adapter``: the server's log-probabilities are not the policy's; ``adapter_unsupported``;
                ``engine_unavailable``.
        """
        digest = policy_digest(policy, torch.float32)
        if digest != self._sent:
            if not self._folders.version:
                with adapted_by(policy, None):
                    self._probe.remember(policy, "the base model")
            self._send(policy)
            self._probe.check(
                policy,
                f"version {self._folders.version} of the adapter, which it was sent",
                f"it serves another base model than {policy.config._name_or_path}, or in too low a precision",
            )
            self._sent = digest
        return self.engine

    def close(self) -> None:
        """Have the server forget the last adapter, and remove its folder. A server that is gone has forgotten it."""
        self._sent = None
        if self._held:
            with suppress(RunError):
                self.engine.unload_adapter(self._held)
            self._held = None
        if self._accelerator.is_main_process:
            self._folders.remove()

    def _send(self, policy: Any) -> None:
        before, first = self._held, self._accelerator.is_main_process
        with self._folders.next() as folder:
            name = f"erpo-{self._run}-{self._folders.version}"
            write_adapter(policy, folder, keep=first)
            if first:
                self.engine.load_adapter(folder, name)
                self._held = name
            self._accelerator.wait_for_everyone()
        self.engine.use_adapter(name)
        if before:
            self.engine.unload_adapter(before)


class VersionFolders:
    """A folder for each version of what is sent: engines know an adapter by its path. Only the last one is kept."""

    def __init__(self, parent: Path) -> None:
        self.version = 0
        self._parent = parent
        self.remove()

    @contextmanager
    def next(self) -> Iterator[Path]:
        """A new version's folder; the one before it is removed once the new one is in use."""
        previous = self._parent / f"version-{self.version}"
        self.version += 1
        yield self._parent / f"version-{self.version}"
        shutil.rmtree(previous, ignore_errors=True)

    def remove(self) -> None:
        """Every folder goes; versions are counted on."""
        shutil.rmtree(self._parent, ignore_errors=True)


def write_adapter(policy: Any, folder: Path, *, keep: bool = True) -> None:
    """Save the adapter ``default``, whole. All ranks must call it where the policy is sharded; those that do not
    ``keep`` write nothing."""
    weights = whole_weights(policy, keep=keep) if is_sharded(policy) else None
    if keep:
        policy.save_pretrained(folder, selected_adapters=["default"], save_embedding_layers=False, state_dict=weights)


def policy_digest(policy: Any, dtype: torch.dtype) -> str:
    """Digest of the adapter ``default`` as an engine of this dtype holds it."""
    return digest_of(scaled_pairs(_pairs(policy), dtype))


def _pairs(policy: Any) -> Iterator[tuple[Tensor, Tensor, float]]:
    from peft.tuners.lora import LoraLayer

    for module in policy.modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
            yield whole(down), whole(up), module.scaling["default"]


def write_weights(policy: Any, folder: Path, dtype: torch.dtype, *, keep: bool) -> None:
    """Save every weight, whole and in this dtype. All ranks must call it; those that do not ``keep`` write nothing."""
    weights = whole_weights(policy, keep=keep)
    if keep:
        policy.save_pretrained(folder, state_dict={name: weight.to(dtype) for name, weight in weights.items()})


def _check_policy(policy: Any, mode: str) -> None:
    if isinstance(policy, PeftModel):
        config = policy.peft_config["default"]
        for name in _UNKNOWN_TO_VLLM:
            if getattr(config, name, None):
                raise ValueError(f"use_vllm: vLLM would leave out the adapter's {name}; write a peft_config without it")
    elif mode == "server":
        raise ValueError(
            "vllm_mode: a vLLM server is sent LoRA adapters, not every weight; give a peft_config, or write colocate"
        )
    if not policy.config._name_or_path:
        raise ValueError("use_vllm: vLLM loads the base by its name; load the model with from_pretrained")
