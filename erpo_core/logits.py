"""Log-probability, entropy and rank of every token from hidden states, with no tokens x vocabulary tensor alive.

The head is applied to a block of tokens at a time, in buffers that all blocks share. Logits are float32 whatever the
model's dtype: rounding them to bfloat16 alone moves entropies by up to 0.2 nats. Entropy uses the max-shifted form
H = log s - t / s with d = z - max z, s = sum e^d, t = sum d e^d, clamped at 0.
"""

# N = tokens, V = vocabulary, H = hidden size, n = tokens of a block

from dataclasses import dataclass, fields

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**23
"""Logits of a block: 32 MiB of float32."""
_CACHED_ELEMENTS = 2**20
"""float32 products at a time on a CPU."""
_LEAST_LOGIT = -1e4
"""Below the highest. A logit of minus infinity has probability 0 and contributes nothing: 0 * inf would be NaN."""


@dataclass(frozen=True)
class TokenScores:
    """One value per token, (N,) float32; ``logps`` alone carries gradient. None is what was not asked for."""

    logps: Tensor
    entropies: Tensor
    top_probs: Tensor
    leverage_norms: Tensor
    """||W[y] - p W||: how far a unit of advantage moves the hidden state; 0 where no gradient was asked for."""
    varentropies: Tensor | None
    ranks: Tensor | None
    """int32, 0 = best."""
    ref_logps: Tensor | None
    """log pi_ref of the same tokens."""
    kls: Tensor | None
    """KL(pi || pi_ref) over the whole vocabulary at each token, exact."""


def score_tokens(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    details: bool = True,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    block_elements: int = BLOCK_ELEMENTS,
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
        details: Also ``varentropies`` and ``ranks``.
        ref_hidden: (N, H) of the reference model, for ``ref_logps`` and ``kls``.
        ref_weight: (V, H), the reference's head; ``weight`` where it is the same.
        block_elements: Logits alive at once, two or three times: more is faster, and more memory.

    Raises:
        ValueError: ``temperature`` is not positive, or ``weight`` requires grad while ``hidden`` does.
    """
    if temperature <= 0:
        raise ValueError("temperature: must be positive")
    needs_grad = torch.is_grad_enabled() and hidden.requires_grad
    if needs_grad and weight.requires_grad:
        raise ValueError("weight: a trainable head is not scored with a cached gradient; freeze it")
    head = _Head(weight, bias, temperature)
    reference = None
    if ref_hidden is not None:
        reference = ref_hidden.detach(), head if ref_weight is None else _Head(ref_weight, bias, temperature)
    return TokenScores(*_Score.apply(hidden, head, targets, details, reference, needs_grad, block_elements))


class _Head:
    """A head in the dtype that its products are computed in."""

    def __init__(self, weight_VH: Tensor, bias_V: Tensor | None, temperature: float) -> None:
        weight_VH = weight_VH.detach()
        self.weight_VH = weight_VH if weight_VH.is_cuda else weight_VH.float()
        self.bias_V = bias_V
        self.temperature = temperature

    def logits(self, hidden_nH: Tensor, out_nV: Tensor | None = None) -> Tensor:
        """float32 logits over the temperature, (n, V), into ``out_nV`` where it is given."""
        hidden_nH = hidden_nH.detach().to(self.weight_VH.dtype)
        if self.weight_VH.dtype == torch.float32:
            logits_nV = torch.mm(hidden_nH, self.weight_VH.T, out=out_nV)
        else:
            logits_nV = torch.mm(hidden_nH, self.weight_VH.T, out_dtype=torch.float32)
        if self.bias_V is not None:
            logits_nV += self.bias_V
        return logits_nV.div_(self.temperature) if self.temperature != 1 else logits_nV


class _Buffers:
    """float32 space for a block's tokens x vocabulary, one for each name, used by every block again."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self._shape, self._device = (rows, columns), device
        self._held: dict[str, Tensor] = {}

    def get(self, name: str, rows: int) -> Tensor:
        if name not in self._held:
            self._held[name] = torch.empty(self._shape, device=self._device)
        return self._held[name][:rows]


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, details, reference, needs_grad, block_elements):
        count, vocabulary = hidden.shape[0], head.weight_VH.shape[0]
        blocks = _blocks(count, vocabulary, block_elements)
        buffers = _Buffers(blocks[0].stop if blocks else 0, vocabulary, hidden.device)
        outputs = _empty_outputs(count, hidden.device, details, reference is not None)
        directions = hidden.new_empty(hidden.shape, dtype=torch.float32) if needs_grad else None
        for part in blocks:
            ref = None if reference is None else (reference[0][part], reference[1])
            _score_block(
                hidden[part],
                head,
                targets[part],
                ref,
                {name: values[part] for name, values in outputs.items()},
                None if directions is None else directions[part],
                buffers,
            )
        if needs_grad:
            ctx.save_for_backward(directions)
        ctx.hidden_dtype = hidden.dtype
        ordered = tuple(outputs.get(field.name) for field in fields(TokenScores))
        ctx.mark_non_differentiable(*(values for values in ordered[1:] if values is not None))
        return ordered

    @staticmethod
    def backward(ctx, grad_logps, *_):
        (directions,) = ctx.saved_tensors
        return (grad_logps[:, None] * directions).to(ctx.hidden_dtype), *(None,) * 6


def _empty_outputs(count: int, device: torch.device, details: bool, reference: bool) -> dict[str, Tensor]:
    names = ["logps", "entropies", "top_probs", "leverage_norms"]
    names += ["varentropies", "ranks"] if details else []
    names += ["ref_logps", "kls"] if reference else []
    types = {"ranks": torch.int32}
    return {name: torch.zeros(count, dtype=types.get(name, torch.float32), device=device) for name in names}


def _blocks(num_tokens: int, vocabulary: int, block_elements: int) -> list[slice]:
    size = max(1, min(num_tokens, block_elements // vocabulary))
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def _score_block(hidden_nH, head: _Head, targets_n, reference, out: dict[str, Tensor], direction_nH, buffers) -> None:
    rows = hidden_nH.shape[0]
    shifted_nV, chosen_n = _shifted(head, hidden_nH, targets_n, buffers.get("policy", rows), out.get("ranks"))
    exp_nV = torch.exp(shifted_nV, out=buffers.get("exp", rows))
    total_n = exp_nV.sum(1)
    log_total_n = total_n.log()
    first_n = _row_dots(exp_nV, shifted_nV) / total_n
    torch.sub(chosen_n, log_total_n, out=out["logps"])
    torch.sub(log_total_n, first_n, out=out["entropies"]).clamp_(min=0)
    torch.reciprocal(total_n, out=out["top_probs"])
    if reference is not None:
        ref_hidden_nH, ref_head = reference
        ref_nV, ref_chosen_n = _shifted(ref_head, ref_hidden_nH, targets_n, buffers.get("reference", rows), None)
        # sum p (log p - log q): the log-normalisers once, the shifted logits under p.
        expected_ref_n = _row_dots(exp_nV, ref_nV) / total_n
        ref_log_total_n = ref_nV.exp_().sum(1).log_()
        torch.sub(ref_chosen_n, ref_log_total_n, out=out["ref_logps"])
        out["kls"].copy_(first_n - log_total_n - expected_ref_n + ref_log_total_n).clamp_(min=0)
    if direction_nH is not None:
        mean_nH = torch.mm(exp_nV.to(head.weight_VH.dtype), head.weight_VH).float().div_(total_n[:, None])
        torch.sub(head.weight_VH[targets_n].float(), mean_nH, out=direction_nH).div_(head.temperature)
        torch.linalg.vector_norm(direction_nH, dim=1, out=out["leverage_norms"])
    if "varentropies" in out:
        second_n = _row_dots(exp_nV, shifted_nV.square_()) / total_n
        torch.sub(second_n, first_n.square(), out=out["varentropies"]).clamp_(min=0)


def _shifted(head: _Head, hidden_nH, targets_n, buffer_nV, ranks_n) -> tuple[Tensor, Tensor]:
    """z - max z (n, V) in place, and that of the targets (n,); ranks where they are wanted."""
    logits_nV = head.logits(hidden_nH, buffer_nV)
    chosen_n1 = logits_nV.gather(1, targets_n[:, None])
    if ranks_n is not None:
        ranks_n.copy_((logits_nV > chosen_n1).sum(1))
    peak_n1 = logits_nV.amax(1, keepdim=True)
    return logits_nV.sub_(peak_n1).clamp_(min=_LEAST_LOGIT), (chosen_n1 - peak_n1).squeeze(1)


def _row_dots(left_nV: Tensor, right_nV: Tensor) -> Tensor:
    """(n,) dot products of the rows, a few rows at a time: their products stay in the cache.

    Sums over the vocabulary are torch's, which adds in a tree. A matrix product adds in order, and in float32 it loses
    the many small terms of a long row: 4e-4 nats of the entropies of a vocabulary of 49 thousand.
    """
    rows = len(left_nV) if left_nV.is_cuda else max(1, _CACHED_ELEMENTS // left_nV.shape[1])
    parts = zip(left_nV.split(rows), right_nV.split(rows), strict=True)
    return torch.cat([(left * right).sum(1) for left, right in parts])


@torch.no_grad()
def top_alternatives(
    hidden: Tensor, weight: Tensor, k: int, *, temperature: float = 1.0, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k most likely tokens of each position: ids (N, k) int64 and log-probabilities (N, k) float32."""
    head = _Head(weight, bias, temperature)
    ids = [hidden.new_zeros((0, k), dtype=torch.int64)]
    logps = [hidden.new_zeros((0, k), dtype=torch.float32)]
    for part in _blocks(hidden.shape[0], weight.shape[0], BLOCK_ELEMENTS):
        logits_nV = head.logits(hidden[part])
        best = logits_nV.topk(k, dim=1)
        ids.append(best.indices)
        logps.append(best.values - logits_nV.logsumexp(1, keepdim=True))
    return torch.cat(ids), torch.cat(logps)
