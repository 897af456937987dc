"""pi_ref: the policy that training started from, frozen, and a fingerprint that shows it stayed so."""

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from erpo_core.trainer import sharding

REFERENCE_ADAPTER = "ref"


class Reference:
    """A fresh adapter needs no copy: switched off it leaves the base.

    An adapter that has been trained already is copied under the name ``ref``; a model without adapters is copied whole.
    """

    def __init__(self, model: Any) -> None:
        from peft import PeftModel

        self._frozen = self._adapter = None
        if not isinstance(model, PeftModel):
            self._frozen = copy.deepcopy(model).eval().requires_grad_(False)
        elif not _is_fresh(model):
            _copy_adapter(model)
            self._adapter = REFERENCE_ADAPTER

    def shard(self, shard: Callable[[Any], Any]) -> None:
        """Spread a copy of its own over the ranks, as the policy is; what is part of the policy is so already."""
        if self._frozen is not None:
            self._frozen = shard(self._frozen)

    @contextmanager
    def of(self, policy: Any) -> Iterator[Any]:
        """The reference as a model, for as long as the policy is not used."""
        if self._frozen is not None:
            yield self._frozen
        elif self._adapter is None:
            with _evaluating(policy), policy.disable_adapter():
                yield policy
        else:
            with _evaluating(policy):
                policy.set_adapter(self._adapter)
                try:
                    yield policy
                finally:
                    policy.set_adapter("default")

    def fingerprint(self, policy: Any) -> str:
        """Of every weight that must never change, by the sums of their bits: a read of the memory, no copy of it.

        The same in shards, where all ranks must ask for it.
        """
        model = policy if self._frozen is None else self._frozen
        sharding.reshard(model)
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        sums = sharding.counts(frozen.values(), _sum_of_bits, model)
        digest = hashlib.sha256()
        for (name, parameter), bits in zip(frozen.items(), sums, strict=True):
            digest.update(f"{name} {sharding.whole_shape(parameter)} {bits}\n".encode())
        return digest.hexdigest()


def _sum_of_bits(parameter: torch.Tensor) -> int:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return parameter.detach().view(integers).sum(dtype=torch.int64).item()


def _is_fresh(model) -> bool:
    """Whether the adapter changes nothing yet."""
    ups = [parameter for name, parameter in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    return bool(ups) and not any(parameter.any() for parameter in ups)


def _copy_adapter(model) -> None:
    model.add_adapter(REFERENCE_ADAPTER, model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            twin = model.get_parameter(name.replace(".default.", f".{REFERENCE_ADAPTER}."))
            twin.data.copy_(parameter.data)
            twin.requires_grad_(False)


@contextmanager
def _evaluating(policy) -> Iterator[None]:
    training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(training)
