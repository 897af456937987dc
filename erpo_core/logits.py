"""Log-probability, entropy and rank of every token from hidden states, with no tokens x vocabulary tensor alive.

The head is applied to a block of tokens at a time. Logits are float32 whatever the model's dtype: rounding them to
bfloat16 alone moves entropies by up to 0.2 nats. Entropy uses the max-shifted form H = log s - t / s with
d = z - max z, s = sum e^d, t = sum d e^d, clamped at 0.
"""

# N = tokens, V = vocabulary, H = hidden size, n = tokens of a block

from dataclasses import dataclass, fields

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 2**24
"""Logits of a block: 64 MiB of float32."""


@dataclass(frozen=True)
class TokenScores:
    """One value per token, (N,). All float32 but ``ranks`` (int32, 0 = best); ``logps`` alone carries gradient."""

    logps: Tensor
    entropies: Tensor
    varentropies: Tensor
    top_probs: Tensor
    ranks: Tensor
    leverage_norms: Tensor
    """||W[y] - p W||: how far a unit of advantage moves the hidden state; 0 where no gradient was asked for."""


def score_tokens(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, bias: Tensor | None = None
) -> TokenScores:
    """Score ``targets`` under softmax((hidden @ weight.T + bias) / temperature).

    Where ``hidden`` requires grad the score vector u = W[y] - p W is kept from the forward, so that the backward of the
    head is one multiplication (d logp / d hidden = u / temperature). The head itself gets no gradient.

    Args:
        hidden: (N, H), any float dtype.
        weight: (V, H), the head's weight.
        targets: (N,) int64.
        temperature: Of the sampling distribution, > 0.
        bias: (V,) or None.

    Raises:
        ValueError: ``temperature`` is not positive, or ``weight`` requires grad while ``hidden`` does.
    """
    if temperature <= 0:
        raise ValueError("temperature: must be positive")
    needs_grad = torch.is_grad_enabled() and hidden.requires_grad
    if needs_grad and weight.requires_grad:
        raise ValueError("weight: a trainable head is not scored with a cached gradient; freeze it")
    outputs = _Score.apply(hidden, weight, targets, temperature, bias, needs_grad)
    return TokenScores(*outputs)


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, bias, needs_grad):
        columns = [[] for _ in fields(TokenScores)]
        directions = []
        for part in _blocks(hidden.shape[0], weight.shape[0]):
            values, direction = _score_block(hidden[part], weight, targets[part], temperature, bias, needs_grad)
            for column, value in zip(columns, values, strict=True):
                column.append(value)
            directions.append(direction)
        if needs_grad:
            ctx.save_for_backward(torch.cat(directions) if directions else hidden.new_zeros(hidden.shape))
        ctx.hidden_dtype = hidden.dtype
        empty = hidden.new_zeros(0, dtype=torch.float32)
        outputs = [torch.cat(column) if column else empty for column in columns]
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx, grad_logps, *_):
        (direction,) = ctx.saved_tensors
        return (grad_logps[:, None] * direction).to(ctx.hidden_dtype), None, None, None, None, None


def _blocks(num_tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, _BLOCK_ELEMENTS // vocabulary)
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


def _score_block(hidden_nH, weight_VH, targets_n, temperature, bias, needs_grad):
    logits_nV = _logits(hidden_nH, weight_VH, temperature, bias)
    chosen_n = logits_nV.gather(1, targets_n[:, None]).squeeze(1)
    ranks_n = (logits_nV > chosen_n[:, None]).sum(1, dtype=torch.int32)
    peak_n1 = logits_nV.amax(1, keepdim=True)
    shifted_nV = logits_nV.sub_(peak_n1)
    exp_nV = shifted_nV.exp()
    total_n = exp_nV.sum(1)
    # A logit of minus infinity has probability 0 and contributes nothing: 0 * inf would be NaN.
    first_n = torch.linalg.vecdot(exp_nV, shifted_nV.clamp_(min=-1e4)) / total_n
    second_n = torch.linalg.vecdot(exp_nV, shifted_nV.square_()) / total_n
    log_total_n = total_n.log()
    logps_n = chosen_n - peak_n1.squeeze(1) - log_total_n
    values = (
        logps_n,
        (log_total_n - first_n).clamp_(min=0),
        (second_n - first_n.square()).clamp_(min=0),
        total_n.reciprocal(),
        ranks_n,
    )
    if not needs_grad:
        return (*values, torch.zeros_like(logps_n)), None
    mean_nH = torch.mm(exp_nV.div_(total_n[:, None]).to(weight_VH.dtype), weight_VH).float()
    direction_nH = (weight_VH[targets_n].float() - mean_nH) / temperature
    return (*values, direction_nH.norm(dim=1)), direction_nH


def _logits(hidden_nH: Tensor, weight_VH: Tensor, temperature: float, bias: Tensor | None) -> Tensor:
    if hidden_nH.dtype == torch.float32 and weight_VH.dtype == torch.float32:
        logits_nV = torch.mm(hidden_nH, weight_VH.T)
    elif hidden_nH.is_cuda:
        logits_nV = torch.mm(hidden_nH.to(weight_VH.dtype), weight_VH.T, out_dtype=torch.float32)
    else:
        logits_nV = torch.mm(hidden_nH.float(), weight_VH.float().T)
    if bias is not None:
        logits_nV += bias
    return logits_nV.div_(temperature) if temperature != 1 else logits_nV


@torch.no_grad()
def top_alternatives(
    hidden: Tensor, weight: Tensor, k: int, *, temperature: float = 1.0, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k most likely tokens of each position: ids (N, k) int64 and log-probabilities (N, k) float32."""
    ids, logps = [], []
    for part in _blocks(hidden.shape[0], weight.shape[0]):
        logits_nV = _logits(hidden[part], weight, temperature, bias)
        best = logits_nV.topk(k, dim=1)
        ids.append(best.indices)
        logps.append(best.values - logits_nV.logsumexp(1, keepdim=True))
    if not ids:
        return hidden.new_zeros((0, k), dtype=torch.int64), hidden.new_zeros((0, k), dtype=torch.float32)
    return torch.cat(ids), torch.cat(logps)
