"""What lies between a model's last hidden states and its logits."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from erpo_core.logits import LogitForm

_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISOR = "logits_scaling"
"""Options of configurations that change the logits after the head; None is without."""
_MULTIPLIES_BY_DIVISOR = ("hyperclovax",)
_ROUNDING = {torch.float32: 1e-3}
"""Of the length of logits: as far as they may lie apart in a dtype."""
_ROUNDING_ELSE = 0.1
_WORDS = 1024
"""Of the vocabulary that are compared."""


def body_of(model: Any) -> Any:
    """The transformer under the head; LoRA layers are inside of it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = base.get_decoder()
    return base.model if decoder is base else decoder  # Llama 4 calls itself its decoder


def logit_form(config: Any) -> LogitForm:
    """What a model's configuration says of its logits."""
    text = config.get_text_config()
    caps = [value for name in _CAPS if (value := getattr(text, name, None)) is not None]
    factors = [value for name in _FACTORS if (value := getattr(text, name, None)) is not None]
    divisor = getattr(text, _DIVISOR, None) or 1
    factors.append(divisor if text.model_type in _MULTIPLIES_BY_DIVISOR else 1 / divisor)
    return LogitForm(scale=math.prod(factors), cap=caps[0] if caps else None)


@torch.no_grad()
def check_head(model: Any) -> None:
    """Try whether the logits of a model are its head's products in :func:`logit_form`; once for each model. One whose
    weights are in shards is not tried.

    Raises:
        ValueError: they are not, so that scores would be wrong.
    """
    if "_has_known_logits" in vars(model) or _is_sharded(model):
        return
    body, head, caught = body_of(model), model.get_output_embeddings(), []
    watch = body.register_forward_hook(lambda *call: caught.append(call[2].last_hidden_state[0].float()))
    try:
        wanted = _trial_logits(model, training=False)
    finally:
        watch.remove()
    bias = getattr(head, "bias", None)
    products = linear(caught[0], head.weight[:_WORDS].float(), None if bias is None else bias[:_WORDS].float())
    apart = distance(logit_form(model.config).of(products), wanted)
    if not apart <= _ROUNDING.get(head.weight.dtype, _ROUNDING_ELSE):
        raise ValueError(
            f"model: {type(model).__name__} changes its logits after the head in a way that is not known (they are "
            f"{apart:.2g} of their length apart), which is not supported"
        )
    model._has_known_logits = True


@torch.no_grad()
def check_training_mode(model: Any) -> None:
    """Try whether a model says in training mode, which gradient checkpointing wants, what it says otherwise.

    Raises:
        ValueError: it does not: its router draws experts, say.
    """
    if _is_sharded(model):
        return
    apart = distance(_trial_logits(model, training=True), _trial_logits(model, training=False))
    if not apart <= _ROUNDING_ELSE:
        raise ValueError(
            f"gradient_checkpointing: {type(model).__name__} gives other logits in training mode ({apart:.2g} of their "
            "length apart); write False"
        )


def _is_sharded(model: Any) -> bool:
    return any(hasattr(weight, "ds_tensor") for weight in model.parameters())


def _trial_logits(model: Any, *, training: bool) -> Tensor:
    """(16, words) float32."""
    body, before = body_of(model), model.training
    ids = torch.arange(3, 19, device=next(body.parameters()).device) % body.config.vocab_size
    try:
        return model.train(training)(input_ids=ids[None], use_cache=False).logits[0, :, :_WORDS].float()
    finally:
        model.train(before)


def distance(found: Tensor, wanted: Tensor) -> float:
    """Between two tensors, over the length of the one that is wanted."""
    return ((found - wanted).norm() / wanted.norm()).item()
