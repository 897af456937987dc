"""Engines that sample from the policy as it is now."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from erpo_core.generation.base import Engine, Sample
from erpo_core.generation.snapshot import PolicySnapshot
from erpo_core.generation.transformers import TransformersEngine
from erpo_core.trainer.sharding import gathered, is_sharded


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
    from erpo_core.trainer.vllm_sampling import make_vllm_sampler

    return make_vllm_sampler(args, policy, tokenizer, accelerator)


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
