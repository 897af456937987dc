"""Engines that sample from the policy as it is now."""

import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from erpo_core.errors import RunError
from erpo_core.generation.adapters import digest_of, scaled_pairs
from erpo_core.generation.base import Engine, Sample
from erpo_core.generation.snapshot import PolicySnapshot
from erpo_core.generation.transformers import TransformersEngine
from erpo_core.trainer.scoring import pad_rollouts, score_rollouts
from erpo_core.trainer.sharding import gathered, is_sharded, whole, whole_weights

_PROBE = "A train leaves at 9:40 and arrives at 13:15. How long does it take? It takes 3 hours and 35 minutes.\n"
_UNKNOWN_TO_VLLM = ("alpha_pattern", "lora_bias", "rank_pattern")
"""Of PEFT's LoraConfig; vLLM reads an adapter that has them, and samples from another policy."""
MOST_APART = 0.1
"""Nats a token, on average, between vLLM and the policy: bfloat16 gives about a tenth of it."""


class Sampler(Protocol):
    """Gives, for the policy, an engine with its current weights. All ranks must call it together."""

    def __call__(self, policy: Any) -> Engine:
        """The engine, at the policy's version."""
        ...

    def close(self) -> None:
        """Give back what was lent outside this process; the next call takes it anew. No rank waits for another."""
        ...


def make_sampler(args: Any, policy: Any, tokenizer: Any, accelerator: Accelerator) -> Sampler:
    """The sampler that the arguments ask for.

    Raises:
        ValueError: ``use_vllm`` with a policy that vLLM cannot follow, by name.
        RunError: ``engine_unavailable``.
    """
    if not args.use_vllm:
        return TransformersSampler(tokenizer)
    _check_policy(policy)
    folder = Path(args.output_dir) / ".vllm-adapters"
    probe = tokenizer(_PROBE)["input_ids"]
    if args.vllm_mode == "server":
        from erpo_core.generation.vllm_server import VLLMServer

        url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        server = VLLMServer(url, logps=True, timeout=args.vllm_server_timeout)
        return ServerSampler(server, folder, accelerator, probe)
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
    return VLLMSampler(engine, dtype, folder / f"rank-{accelerator.process_index}", probe)


class TransformersSampler:
    """The policy itself; on a CPU a copy of it that decodes faster, where there is one.

    A policy in shards samples with its weights gathered: the ranks end their answers at different times.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._snapshot: PolicySnapshot | None = None

    def __call__(self, policy: Any) -> Engine:
        """The engine, at the policy's version."""
        if is_sharded(policy):
            return GatheredEngine(policy, self._tokenizer, fixed_shapes=False)
        if not PolicySnapshot.suits(policy):
            return TransformersEngine(policy, self._tokenizer)
        self._snapshot = self._snapshot or PolicySnapshot(policy)
        self._snapshot.refresh()
        return TransformersEngine(self._snapshot.model, self._tokenizer)

    def close(self) -> None:
        """Nothing was lent."""


class GatheredEngine(TransformersEngine):
    """Has the weights of a sharded model whole while it samples. All ranks must sample together."""

    def generate(self, prompts: Sequence[Sequence[int]], **call: Any) -> list[list[Sample]]:
        """As :class:`TransformersEngine`."""
        with gathered(self.model):
            if not prompts:
                # FSDP2 remembers the forwards since the last backward, and gathers by them in the next one: a rank
                # without any would wait for others than the one it shares its work with.
                with torch.no_grad():
                    self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.model.device), use_cache=False)
            return super().generate(prompts, **call)


class VLLMSampler:
    """Keeps a vLLM engine at the policy's adapter. The base weights never move: what the engine gets is the adapter.

    Each version goes through a folder of its own, and what the engine then holds is compared with the policy, tensor by
    tensor: an engine that samples from another version ends the run. The base it has loaded by its name: before the
    first adapter, its log-probabilities of a fixed text are compared with those of the policy's base.
    """

    def __init__(self, engine: Any, dtype: torch.dtype, folder: Path, probe: list[int]) -> None:
        self.engine = engine
        self._dtype = dtype
        self._folders = VersionFolders(folder)
        self._probe = probe[: engine.max_model_len - 1]
        self._sent: str | None = None

    def __call__(self, policy: Any) -> Engine:
        """The engine, at the policy's version.

        Raises:
            RunError: ``stale_adapter``: the engine holds another adapter than the policy's, or another base;
                ``adapter_unsupported``.
        """
        if not self._folders.version:
            self._check_base(policy)
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

    def _check_base(self, policy: Any) -> None:
        with policy.disable_adapter():
            ours = _logps(policy, self._probe)
        apart = _apart(torch.tensor(self.engine.prompt_logps(self._probe)), ours)
        if not apart <= MOST_APART:
            raise RunError(
                f"vLLM has loaded {policy.config._name_or_path}, and on a fixed text its log-probabilities are "
                f"{apart:.2g} nats from those of the model that is trained, more than {MOST_APART}: weights that were "
                "changed in memory (an adapter merged into them, say) must be saved, and the model loaded from there",
                code="stale_adapter",
            )


class ServerSampler:
    """Keeps a vLLM server at the policy's adapter: the first rank sends it, all ranks sample.

    A server does not say what it holds. What it must say right are the log-probabilities of a fixed text: they are
    compared with the policy's, with those of the version before, and with the base model's.
    """

    def __init__(self, server: Any, folder: Path, accelerator: Accelerator, probe: list[int]) -> None:
        self.engine = server
        self._accelerator = accelerator
        self._folders = VersionFolders(folder)
        self._probe = probe[: server.max_model_len - 1]
        self._run = broadcast_object_list([uuid.uuid4().hex[:12]])[0]
        accelerator.wait_for_everyone()  # all have emptied the folder before the first one writes
        self._sent: str | None = None
        self._others: dict[str, Tensor] = {}
        """What the probe would be if the server held something else."""

    def __call__(self, policy: Any) -> Engine:
        """The server, at the policy's version.

        Raises:
            RunError: ``stale_adapter``: the server's log-probabilities are not the policy's; ``adapter_unsupported``;
                ``engine_unavailable``.
        """
        digest = policy_digest(policy, torch.float32)
        if digest != self._sent:
            self._send(policy)
            self._check(policy)
            self._sent = digest
        return self.engine

    def close(self) -> None:
        """Have the server forget the last adapter, and remove its folder. A server that is gone has forgotten it."""
        self._sent = None
        if self._accelerator.is_main_process and self._folders.version:
            with suppress(RunError):
                self.engine.unload_adapter(self._name())
            self._folders.remove()

    def _send(self, policy: Any) -> None:
        before = self._name()
        with self._folders.next() as folder:
            first = self._accelerator.is_main_process
            write_adapter(policy, folder, keep=first)
            if first:
                self.engine.load_adapter(folder, self._name())
            self._accelerator.wait_for_everyone()
        self.engine.use_adapter(self._name())
        if first:
            self.engine.unload_adapter(before)

    def _name(self) -> str:
        return f"erpo-{self._run}-{self._folders.version}"

    def _check(self, policy: Any) -> None:
        if not self._others:
            with policy.disable_adapter():
                self._others["the base model"] = _logps(policy, self._probe)
        ours = _logps(policy, self._probe)
        theirs = torch.tensor(self.engine.prompt_logps(self._probe))
        apart = _apart(theirs, ours)
        for name, other in self._others.items():
            nearer = _apart(theirs, other)
            if nearer < apart and _apart(ours, other) > 2 * nearer:
                raise RunError(
                    f"the vLLM server answers as {name} does, not as version {self._folders.version} of the adapter, "
                    f"which it was sent (log-probabilities of a fixed text: {nearer:.2g} and {apart:.2g} nats apart)",
                    code="stale_adapter",
                )
        if not apart <= MOST_APART:
            raise RunError(
                f"the log-probabilities of the vLLM server and of the policy are {apart:.2g} nats apart on a fixed "
                f"text, more than {MOST_APART}: it serves another base model than {policy.config._name_or_path}, or "
                "in too low a precision",
                code="stale_adapter",
            )
        self._others["the version before"] = ours


class VersionFolders:
    """A folder for each version of an adapter: engines know an adapter by its path. Only the last one is kept."""

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


@torch.no_grad()
def _logps(policy: Any, ids: list[int]) -> Tensor:
    """(len(ids) - 1,): what the policy says of a text at temperature 1, on the CPU."""
    rollouts = pad_rollouts([ids[:1]], [ids[1:]], 0, policy.device)
    training = policy.training
    policy.eval()
    found = score_rollouts(policy, rollouts, temperature=1.0).logps.cpu()
    policy.train(training)
    return found


def _apart(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().mean().item()


def _check_policy(policy: Any) -> None:
    from peft import PeftModel

    if not isinstance(policy, PeftModel):
        raise ValueError("use_vllm: vLLM is sent LoRA adapters, not whole weights; give a peft_config")
    config = policy.peft_config["default"]
    for name in _UNKNOWN_TO_VLLM:
        if getattr(config, name, None):
            raise ValueError(f"use_vllm: vLLM would leave out the adapter's {name}; write a peft_config without it")
    if not policy.config._name_or_path:
        raise ValueError("use_vllm: vLLM loads the base by its name; load the model with from_pretrained")
