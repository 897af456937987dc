"""Log-probabilities and entropies of sampled answers by one teacher-forced pass over a packed row."""

# N = active tokens, G = responses a group, B = responses, T = completion tokens, H = hidden size

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from erpo_core.heads import body_of, logit_form
from erpo_core.logits import LogitForm, TokenScores, score_tokens
from erpo_core.packing import PackedRow, of_like_length, pack, packed_hidden, supports_packing
from erpo_core.trainer.sharding import goes_in_step, inside

_CUDA_TILE_ELEMENTS = 2**27
"""Logits alive at once: fewer launches, and training has gigabytes of activations beside them."""
_TRAINABLE_HEAD_BLOCK = 256
"""Tokens of a block where the head is trained: its logits are computed again in the backward."""


@dataclass(frozen=True)
class Rollouts:
    """Some groups of answers; completions are padded on the right."""

    prompts: tuple[tuple[int, ...], ...]
    """One for each group."""
    completion_ids: Tensor
    """(B, T) int64, rows of one group adjacent."""
    mask: Tensor
    """(B, T) bool, true on completion tokens; a row that is all false takes no part."""

    @property
    def num_generations(self) -> int:
        """G."""
        return len(self.completion_ids) // len(self.prompts)

    @cached_property
    def answers(self) -> list[list[int]]:
        """The active tokens of each row."""
        lengths = self.mask.sum(1).tolist()
        return [ids[:length] for ids, length in zip(self.completion_ids.tolist(), lengths, strict=True)]

    @cached_property
    def row(self) -> PackedRow:
        """All of it as one row."""
        return pack(self.prompts, self.answers, self.completion_ids.device)

    def of_groups(self, kept: Tensor) -> "Rollouts":
        """Those of the prompts where ``kept``, (prompts,) bool, is true."""
        rows = kept.repeat_interleave(self.num_generations)
        prompts = tuple(prompt for prompt, keep in zip(self.prompts, kept.tolist(), strict=True) if keep)
        return Rollouts(prompts, self.completion_ids[rows], self.mask[rows])

    def part(self, start: int, end: int) -> "Rollouts":
        """Responses ``start`` to ``end``: some of one group, or whole groups."""
        first, last = start // self.num_generations, (end - 1) // self.num_generations
        return Rollouts(self.prompts[first : last + 1], self.completion_ids[start:end], self.mask[start:end])


def pad_rollouts(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int, device
) -> Rollouts:
    """Rollouts of N prompts and their B completions."""
    length = max(1, *(len(completion) for completion in completions))
    completion_ids = torch.full((len(completions), length), pad_id, dtype=torch.long)
    mask = torch.zeros(completion_ids.shape, dtype=torch.bool)
    for row, completion in enumerate(completions):
        completion_ids[row, : len(completion)] = torch.tensor(completion, dtype=torch.long)
        mask[row, : len(completion)] = True
    return Rollouts(tuple(map(tuple, prompts)), completion_ids.to(device), mask.to(device))


@dataclass(frozen=True)
class ReferenceStates:
    """What the reference model says of the same tokens, before its head."""

    hidden: Tensor
    """(N, H), no gradient."""
    weight: Tensor | None
    """(V, H) of its head; None where it is the policy's."""
    bias: Tensor | None = None
    """(V,) of a head of its own, if that has one."""


def hidden_states(model: Any, rollouts: Rollouts, *, packed: bool | None = None) -> Tensor:
    """(N, H) states that predict the active tokens, in row-major order of ``rollouts.mask``.

    Args:
        model: A causal language model, LoRA in place or not, without a DDP wrapper.
        packed: One row without padding; otherwise each answer behind its own copy of the prompt. By default wherever
            the model supports it: values and gradient are the same.
    """
    body = body_of(model)
    if supports_packing(body) if packed is None else packed:
        return packed_hidden(body, rollouts.row)
    # Ranks that share their weights call the layers together, and so equally often.
    return _padded_hidden(body, rollouts, at_once=goes_in_step(model))


@torch.no_grad()
def reference_states(reference: Any, policy: Any, rollouts: Rollouts, *, packed: bool | None = None) -> ReferenceStates:
    """For ``score_rollouts`` of ``policy``."""

    def states() -> tuple[Tensor | None, ...]:
        hidden = hidden_states(reference, rollouts, packed=packed)
        if _has_one_head(reference, policy):
            return hidden, None
        head = _whole_head(reference)
        bias = getattr(head, "bias", None)
        return hidden, head.weight.detach(), None if bias is None else bias.detach()

    return ReferenceStates(*inside(reference, states))


def _has_one_head(reference: Any, policy: Any) -> bool:
    """Whether both score with one weight, now and where the policy's adapter is on."""
    head = policy.get_output_embeddings()
    return head is reference.get_output_embeddings() and not depends_on_adapter(head)


def depends_on_adapter(head: Any) -> bool:
    """Whether PEFT trains it (`modules_to_save`, tied `trainable_token_indices`): then it is the original one for as
    long as the adapter is off."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(head, AuxiliaryTrainingWrapper)


def score_rollouts(
    model: Any,
    rollouts: Rollouts,
    *,
    temperature: float,
    reference: ReferenceStates | None = None,
    packed: bool | None = None,
) -> TokenScores:
    """Scores of the active completion tokens, (N,) in row-major order of ``rollouts.mask``.

    Args:
        model: See :func:`hidden_states`.
        temperature: Of the sampling distribution.
        reference: For ``ref_logps`` and ``kls``.
        packed: See :func:`hidden_states`.
    """
    form = logit_form(model.config)
    targets_N = rollouts.completion_ids[rollouts.mask]

    def scores() -> tuple[Tensor | None, ...]:
        hidden_NH = hidden_states(model, rollouts, packed=packed)
        # Autocast would compute the logits in bfloat16: a difference of two such log-probabilities is noise.
        with torch.autocast(hidden_NH.device.type, enabled=False):
            found = _score_head(_whole_head(model), form, hidden_NH, targets_N, temperature, reference)
        return tuple(vars(found).values())

    return TokenScores(*inside(model, scores))


def _whole_head(model: Any) -> Any:
    """The head of a model inside of :func:`~erpo_core.trainer.sharding.inside`, with its weight whole.

    Raises:
        ValueError: FSDP2 has the head apart from what is called, and would not reduce its gradients.
    """
    head = model.get_output_embeddings()
    if isinstance(head.weight, DTensor):  # not tied, and below an adapter: FSDP2 would gather it when it is called
        if depends_on_adapter(head):
            raise ValueError("modules_to_save: a trained head is not supported with FSDP2; use DDP or ZeRO")
        head.unshard()
    return head


def merge_scores(kept: TokenScores, others: TokenScores, where_N: Tensor) -> TokenScores:
    """Scores of all tokens from those where ``where_N`` (N,) bool is true and those where it is not, both in order."""
    order_N = torch.empty_like(where_N, dtype=torch.long)
    order_N[where_N.logical_not().argsort(stable=True)] = torch.arange(len(where_N), device=where_N.device)

    def merged(one: Tensor | None, two: Tensor | None) -> Tensor | None:
        return None if one is None else torch.cat([one, two]).index_select(0, order_N)

    names = [field.name for field in fields(TokenScores)]
    return TokenScores(**{name: merged(getattr(kept, name), getattr(others, name)) for name in names})


def _score_head(
    head, form: LogitForm, hidden_NH: Tensor, targets_N: Tensor, temperature: float, reference
) -> TokenScores:
    weight, bias = head.weight, getattr(head, "bias", None)
    trained = torch.is_grad_enabled() and weight.requires_grad
    scores = score_tokens(
        hidden_NH.detach().requires_grad_() if trained else hidden_NH,
        weight.detach(),
        targets_N,
        temperature=temperature,
        bias=None if bias is None else bias.detach(),
        form=form,
        details=False,
        ref_hidden=None if reference is None else reference.hidden,
        ref_weight=None if reference is None else reference.weight,
        ref_bias=None if reference is None else reference.bias,
        tile_elements=_CUDA_TILE_ELEMENTS if hidden_NH.is_cuda else None,
    )
    if not trained:
        return scores
    # A trained head needs a gradient of its own, which the cached score vector does not give.
    logps = [
        checkpoint(_trainable_logps, hidden, weight, bias, form, targets, temperature, use_reentrant=False)
        for hidden, targets in zip(
            hidden_NH.split(_TRAINABLE_HEAD_BLOCK), targets_N.split(_TRAINABLE_HEAD_BLOCK), strict=True
        )
    ]
    trained_logps = torch.cat(logps)
    # The value of score_tokens, which scores the reference as well: the difference of two implementations is noise.
    return replace(scores, logps=scores.logps.detach() + (trained_logps - trained_logps.detach()))


def _trainable_logps(hidden_nH, weight_VH, bias_V, form: LogitForm, targets_n, temperature: float) -> Tensor:
    products_nV = torch.nn.functional.linear(
        hidden_nH.float(), weight_VH.float(), None if bias_V is None else bias_V.float()
    )
    return (form.of(products_nV) / temperature).log_softmax(1).gather(1, targets_n[:, None]).squeeze(1)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """(N,) back to (B, T), 0 elsewhere."""
    out = values.new_zeros(mask.shape)
    out[mask] = values
    return out


def _padded_hidden(body, rollouts: Rollouts, *, at_once: bool) -> Tensor:
    """Each answer behind its prompt, padded on the right, together with those of like length."""
    prompts = [prompt for prompt in rollouts.prompts for _ in range(rollouts.num_generations)]
    rows = [_Row(*row) for row in zip(prompts, rollouts.answers, strict=True)]
    for batch in [rows] if at_once else of_like_length(rows):
        width = max(map(len, batch))
        ids = torch.tensor([row.padded(width) for row in batch], device=rollouts.mask.device)
        lengths = torch.tensor([len(row) for row in batch], device=ids.device)
        mask = (torch.arange(width, device=ids.device) < lengths[:, None]).long()
        states = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        for row, of_row in zip(batch, states, strict=True):
            row.hidden = of_row[len(row.prompt) - 1 :][: len(row.answer)]
    return torch.cat([row.hidden for row in rows])


@dataclass(eq=False)
class _Row:
    """An answer behind its prompt, and what predicts its tokens."""

    prompt: Sequence[int]
    answer: Sequence[int]
    hidden: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)

    def padded(self, width: int) -> list[int]:
        return [*self.prompt, *self.answer, *[0] * (width - len(self))]
