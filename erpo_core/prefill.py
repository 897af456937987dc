"""The prompts' part of a forward: what all of them begin with is computed once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEAST_PREFIX = 16
"""Tokens; a second call of the model costs more than a shorter common prefix saves."""


@dataclass(frozen=True)
class PaddedPrompts:
    """N prompts that end in one column. Padding stands between the common prefix and what is a prompt's own."""

    ids: Tensor
    """(N, P) int64."""
    mask: Tensor
    """(N, P) int64, 1 on prompt tokens."""
    shared: int
    """Leading columns that are the same tokens in every row, 0 if they are not worth a call of their own."""


def pad_prompts(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device | str, *, share: bool = True
) -> PaddedPrompts:
    """Prompts side by side.

    Args:
        share: False leaves all padding in front of a prompt, none inside of it.

    Raises:
        ValueError: an empty prompt.
    """
    if not all(prompts):
        raise ValueError("prompts: each must hold a token")
    shared = shared_prefix(prompts) if share else 0
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        own = len(prompt) - shared
        ids[row, :shared] = torch.tensor(prompt[:shared], dtype=torch.long)
        ids[row, width - own :] = torch.tensor(prompt[shared:], dtype=torch.long)
        mask[row, :shared] = 1
        mask[row, width - own :] = 1
    return PaddedPrompts(ids.to(device), mask.to(device), shared)


def prefill(model: Any, prompts: PaddedPrompts, *, cache: Any = None, **options: Any) -> Any:
    """The model's output for the last P - shared columns, its ``past_key_values`` of all P columns.

    Args:
        model: A causal language model or its body; called once, or twice where the prompts share a prefix.
        cache: An empty cache to fill; the model's own kind by default.
        options: Passed to every call.
    """
    ids, mask, shared = prompts.ids, prompts.mask, prompts.shared
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if shared:
        start = model(
            input_ids=ids[:1, :shared],
            position_ids=positions[:1, :shared],
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        cache = start.past_key_values
        cache.batch_repeat_interleave(len(ids))
    return model(
        input_ids=ids[:, shared:],
        attention_mask=mask,
        position_ids=positions[:, shared:],
        past_key_values=cache,
        use_cache=True,
        **options,
    )


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Common leading tokens, of which every prompt keeps at least its last token to itself."""
    if len(prompts) == 1:
        return 0
    columns = enumerate(zip(*prompts, strict=False))
    shortest = min(map(len, prompts))
    common = next((place for place, tokens in columns if len(set(tokens)) > 1), shortest)
    common = min(common, shortest - 1)
    return common if common >= LEAST_PREFIX else 0
