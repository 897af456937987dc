"""Log-probabilities and entropies of sampled answers by one teacher-forced pass, the prompt computed once per group."""

# N = groups, G = responses a group, B = N * G, P = prompt tokens, T = completion tokens, H = hidden size

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from erpo_core.logits import TokenScores, score_tokens
from erpo_core.prefill import PaddedPrompts, pad_prompts, prefill

_TRAINABLE_HEAD_BLOCK = 256
"""Tokens of a block where the head is trained: its logits are computed again in the backward."""


@dataclass(frozen=True)
class Rollouts:
    """Some groups of answers, padded: prompts to end in one column, completions to begin in one."""

    prompts: PaddedPrompts
    """N prompts of P columns."""
    completion_ids: Tensor
    """(B, T) int64, rows of one group adjacent."""
    mask: Tensor
    """(B, T) bool, true on completion tokens."""

    @property
    def num_generations(self) -> int:
        """G."""
        return len(self.completion_ids) // len(self.prompts.ids)

    def part(self, start: int, end: int) -> "Rollouts":
        """Responses ``start`` to ``end``, which belong to one group."""
        prompt = self.prompts.row(start // self.num_generations)
        return Rollouts(prompt, self.completion_ids[start:end], self.mask[start:end])


def pad_rollouts(prompts: list[list[int]], completions: list[list[int]], pad_id: int, device) -> Rollouts:
    """Rollouts of N prompts and their B completions."""
    length = max(1, *(len(completion) for completion in completions))
    completion_ids = torch.full((len(completions), length), pad_id, dtype=torch.long)
    mask = torch.zeros(completion_ids.shape, dtype=torch.bool)
    for row, completion in enumerate(completions):
        completion_ids[row, : len(completion)] = torch.tensor(completion, dtype=torch.long)
        mask[row, : len(completion)] = True
    return Rollouts(pad_prompts(prompts, pad_id, device), completion_ids.to(device), mask.to(device))


def score_rollouts(model, rollouts: Rollouts, *, temperature: float, share_prompt: bool = True) -> TokenScores:
    """Scores of the active completion tokens, (active tokens,) in row-major order of ``rollouts.mask``.

    Args:
        model: A causal language model, LoRA in place or not, without a DDP wrapper.
        temperature: Of the sampling distribution.
        share_prompt: Compute each prompt once and let its G answers attend to one cache; the gradient is the same.

    Raises:
        ValueError: the model changes its logits after the head (soft-capping, scaling).
    """
    check_head(model.config)
    hidden_BTH = (_shared_hidden if share_prompt else _plain_hidden)(body_of(model), rollouts)
    head = model.get_output_embeddings()
    hidden_nH = hidden_BTH[rollouts.mask]
    targets_n = rollouts.completion_ids[rollouts.mask]
    # Autocast would compute the logits in bfloat16: a difference of two such log-probabilities is noise.
    with torch.autocast(hidden_nH.device.type, enabled=False):
        return _score_head(head, hidden_nH, targets_n, temperature)


def _score_head(head, hidden_nH: Tensor, targets_n: Tensor, temperature: float) -> TokenScores:
    weight, bias = head.weight, getattr(head, "bias", None)
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return score_tokens(hidden_nH, weight, targets_n, temperature=temperature, bias=bias)
    # A trained head needs a gradient of its own, which the cached score vector does not give.
    fixed_bias = None if bias is None else bias.detach()
    apart_nH = hidden_nH.detach().requires_grad_()
    scores = score_tokens(apart_nH, weight.detach(), targets_n, temperature=temperature, bias=fixed_bias)
    parts = [
        checkpoint(_trainable_logps, hidden, weight, bias, targets, temperature, use_reentrant=False)
        for hidden, targets in zip(
            hidden_nH.split(_TRAINABLE_HEAD_BLOCK), targets_n.split(_TRAINABLE_HEAD_BLOCK), strict=True
        )
    ]
    trained = torch.cat(parts) if parts else scores.logps
    # The value of score_tokens, which scores the reference as well: the difference of two implementations is noise.
    return replace(scores, logps=scores.logps.detach() + (trained - trained.detach()))


def _trainable_logps(hidden_nH, weight_VH, bias_V, targets_n, temperature: float) -> Tensor:
    logits_nV = torch.nn.functional.linear(
        hidden_nH.float(), weight_VH.float(), None if bias_V is None else bias_V.float()
    )
    return (logits_nV / temperature).log_softmax(1).gather(1, targets_n[:, None]).squeeze(1)


def body_of(model):
    """The transformer under the head; LoRA layers are inside of it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_decoder()


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """(active tokens,) back to (B, T), 0 elsewhere."""
    out = values.new_zeros(mask.shape)
    out[mask] = values
    return out


def _shared_hidden(body, rollouts: Rollouts) -> Tensor:
    group_size = rollouts.num_generations
    prompt = prefill(body, rollouts.prompts)
    first_B1H = prompt.last_hidden_state[:, -1:].repeat_interleave(group_size, 0)
    if rollouts.completion_ids.shape[1] == 1:
        return first_B1H
    cache = prompt.past_key_values
    if group_size > 1:
        cache.batch_repeat_interleave(group_size)
    prompt_mask_BP = rollouts.prompts.mask.repeat_interleave(group_size, 0)
    ids_BT = rollouts.completion_ids[:, :-1]
    steps_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    rest = body(
        input_ids=ids_BT,
        attention_mask=torch.cat([prompt_mask_BP, rollouts.mask[:, :-1].to(prompt_mask_BP.dtype)], 1),
        position_ids=prompt_mask_BP.sum(1, keepdim=True) + steps_T,
        past_key_values=cache,
        use_cache=True,
    )
    return torch.cat([first_B1H, rest.last_hidden_state], 1)


def _plain_hidden(body, rollouts: Rollouts) -> Tensor:
    group_size = rollouts.num_generations
    prompt_mask_BP = rollouts.prompts.mask.repeat_interleave(group_size, 0)
    ids = torch.cat([rollouts.prompts.ids.repeat_interleave(group_size, 0), rollouts.completion_ids], 1)
    mask = torch.cat([prompt_mask_BP, rollouts.mask.to(prompt_mask_BP.dtype)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = body(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    return output.last_hidden_state[:, rollouts.prompts.ids.shape[1] - 1 : -1]


def check_head(config) -> None:
    """Raises ValueError for a model that changes its logits after the head."""
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ValueError(f"model: its logits are changed after the head ({name}), which is not supported")
