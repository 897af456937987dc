"""pi_ref: the policy that training started from, frozen."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

REFERENCE_ADAPTER = "ref"


def make_reference(model) -> Callable[..., AbstractContextManager]:
    """A function of the policy that gives, as a context manager, the reference model.

    A fresh adapter needs no copy: switched off it leaves the base. An adapter that has been trained already is copied
    under the name ``ref``; a model without adapters is copied whole.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        frozen = copy.deepcopy(model).eval().requires_grad_(False)
        return lambda policy: nullcontext(frozen)
    if _is_fresh(model):
        return _without_adapter
    _copy_adapter(model)
    return _with_copy


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
def _without_adapter(policy) -> Iterator:
    with _evaluating(policy), policy.disable_adapter():
        yield policy


@contextmanager
def _with_copy(policy) -> Iterator:
    with _evaluating(policy):
        policy.set_adapter(REFERENCE_ADAPTER)
        try:
            yield policy
        finally:
            policy.set_adapter("default")


@contextmanager
def _evaluating(policy) -> Iterator[None]:
    training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(training)
