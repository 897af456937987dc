"""pi_ref: the policy that training started from, frozen, and a fingerprint that shows it stayed so."""

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from erpo_core.trainer import sharding

REFERENCE_ADAPTER = "ref"
POLICY_ADAPTER = "default"
_INITS = ("true", "false", "gaussian", "eva", "orthogonal")
"""PEFT's ``init_lora_weights`` that leave the base as it is; the others move a part of it into the adapter."""
_VARIANTS = {
    "alora_invocation_tokens": "the adapter is on for every token",
    "arrow_config": "one adapter is trained",
    "kasa_config": "it cuts the base's weights, which are the reference",
    "monteclora_config": "it is noise in the progress signal",
}


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
            return
        with _evaluating(policy), adapted_by(policy, self._adapter):
            yield policy

    def fingerprint(self, policy: Any) -> str:
        """Of every weight that must never change: a read of the memory, no copy of it. All ranks must ask for it."""
        model = policy if self._frozen is None else self._frozen
        return fingerprint_of(model, lambda parameter: not parameter.requires_grad)


def fingerprint_of(model: Any, counts: Callable[[torch.Tensor], bool]) -> str:
    """Of those of a model's weights that count, by the sums of their bits. The same in shards, where all ranks must ask
    for it."""
    sharding.reshard(model)
    parameters = {name: parameter for name, parameter in model.named_parameters() if counts(parameter)}
    sums = sharding.counts(parameters.values(), _sum_of_bits, model)
    digest = hashlib.sha256()
    for (name, parameter), bits in zip(parameters.items(), sums, strict=True):
        digest.update(f"{name} {sharding.whole_shape(parameter)} {bits}\n".encode())
    return digest.hexdigest()


def check_adapters(model: Any, peft_config: Any) -> None:
    """
    Args:
        model: What a trainer is given: a model, with adapters or without, or a name.
        peft_config: Of an adapter that is yet to be made, or None.

    Raises:
        ValueError: an adapter without which the model is not its base, or which scoring would not see.
    """
    from peft import PeftModel

    if peft_config is not None:
        _check_config(peft_config)
    if not isinstance(model, PeftModel):
        return
    for config in model.peft_config.values():
        _check_config(config)
    if model.active_adapters != [POLICY_ADAPTER]:
        found = ", ".join(model.active_adapters)
        raise ValueError(
            f"model: its active adapter must be called {POLICY_ADAPTER!r}, not {found}; load it with "
            f"adapter_name={POLICY_ADAPTER!r}"
        )


def _check_config(config: Any) -> None:
    if config.peft_type != "LORA":
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"peft_config: {kind} is not supported, only LORA is; write a LoraConfig")
    if config.bias != "none":
        raise ValueError(
            f"peft_config: bias={config.bias!r} trains biases of the base, which is the reference; write 'none'"
        )
    if str(config.init_lora_weights).lower() not in _INITS:
        raise ValueError(
            f"peft_config: init_lora_weights={config.init_lora_weights!r} changes the base, which is the reference; "
            "write True, False, 'gaussian', 'eva' or 'orthogonal'"
        )
    for name, why in _VARIANTS.items():
        if getattr(config, name, None) is not None:
            raise ValueError(f"peft_config: {name} is not supported ({why}); leave it at None")


def _sum_of_bits(parameter: torch.Tensor) -> int:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return parameter.detach().view(integers).sum(dtype=torch.int64).item()


def _is_fresh(model) -> bool:
    """Whether the adapter changes nothing yet."""
    ups = [parameter for name, parameter in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    return bool(ups) and not any(parameter.any() for parameter in ups)


def _copy_adapter(model) -> None:
    model.add_adapter(REFERENCE_ADAPTER, model.peft_config[POLICY_ADAPTER])
    for name, parameter in model.named_parameters():
        parts = name.split(".")  # the adapter's name stands before `weight`, or last: LoRA of an embedding
        if POLICY_ADAPTER in parts:
            twin = ".".join(REFERENCE_ADAPTER if part == POLICY_ADAPTER else part for part in parts)
            copied = model.get_parameter(twin)
            copied.data.copy_(parameter.data)
            copied.requires_grad_(False)


@contextmanager
def adapted_by(policy: Any, adapter: str | None) -> Iterator[None]:
    """The policy's adapter is off, and this one on, if there is one."""
    # PEFT says of the parameters that it finds whether they are trained; FSDP2 goes by the parts.
    sharding.reshard(policy)
    with ExitStack() as back:
        if adapter is None:
            back.enter_context(policy.disable_adapter())
        else:
            policy.set_adapter(adapter)
            back.callback(policy.set_adapter, POLICY_ADAPTER)
        back.callback(sharding.reshard, policy)
        yield


@contextmanager
def _evaluating(policy) -> Iterator[None]:
    training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(training)
