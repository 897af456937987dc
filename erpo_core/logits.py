"""Log-probability, entropy and rank of every token from hidden states, with no tokens x vocabulary tensor alive.

The head is applied to a block of tokens and a tile of the vocabulary at a time, in buffers that all tiles share: small
enough for a processor's cache, and large enough for products to run at full speed. Logits are float32 whatever the
model's dtype: rounding them to bfloat16 alone moves entropies by up to 0.2 nats. Entropy uses the max-shifted form
H = log s - t / s with d = z - max z, s = sum e^d, t = sum d e^d, clamped at 0; from tile to tile the sums move to the
new maximum (online softmax, arXiv 1805.02867).
"""

# N = tokens, V = vocabulary, H = hidden size, n = tokens of a block, v = vocabulary of a tile

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

TILE_ELEMENTS = {"cpu": 2**21, "cuda": 2**23}
"""Logits alive at once, by kind of device: 8 MiB of float32 stay in the cache of a CPU."""
_LEAST_ROWS = 2048
"""Tokens of a block, where there are as many: each block reads the head once."""
_ALIGNED = 64
"""Rows of a tile are multiples of it: products write those faster."""
_ALTERNATIVES_ELEMENTS = 2**23
_LEAST_LOGIT = -1e4
"""Below the highest. A logit of minus infinity has probability 0 and contributes nothing: 0 * inf would be NaN."""


@dataclass(frozen=True)
class LogitForm:
    """What a model makes of its head's products z: ``cap * tanh(scale * z / cap)``, without a cap ``scale * z``."""

    scale: float = 1.0
    cap: float | None = None

    def of(self, products: Tensor) -> Tensor:
        """Logits of the same shape."""
        scaled = products if self.scale == 1 else products * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)


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
    form: LogitForm = LogitForm(),
    details: bool = True,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    tile_elements: int | None = None,
) -> TokenScores:
    """Score ``targets`` under softmax(form(hidden @ weight.T + bias) / temperature).

    Where ``hidden`` requires grad the score vector u = W[y] - p W is kept from the forward, so that the backward of the
    head is one multiplication (d logp / d hidden = u / temperature). Under a cap each row of W counts as much as its
    logit is steep. The head itself gets no gradient.

    Args:
        hidden: (N, H), any float dtype.
        weight: (V, H), the head's weight.
        targets: (N,) int64.
        temperature: Of the sampling distribution, > 0.
        bias: (V,) or None.
        form: Of the logits, the reference's as well.
        details: Also ``varentropies`` and ``ranks``.
        ref_hidden: (N, H) of the reference model, for ``ref_logps`` and ``kls``.
        ref_weight: (V, H), the reference's head; None where it is the same, its bias too.
        ref_bias: (V,) of a head of its own, or None.
        tile_elements: Logits alive at once, two or three times; None: ``TILE_ELEMENTS`` of the device.

    Raises:
        ValueError: ``temperature`` is not positive, or ``weight`` requires grad while ``hidden`` does.
    """
    if temperature <= 0:
        raise ValueError("temperature: must be positive")
    needs_grad = torch.is_grad_enabled() and hidden.requires_grad
    if needs_grad and weight.requires_grad:
        raise ValueError("weight: a trainable head is not scored with a cached gradient; freeze it")
    head = _Head(weight, bias, temperature, form)
    reference = None
    if ref_hidden is not None:
        reference = ref_hidden.detach(), head if ref_weight is None else _Head(ref_weight, ref_bias, temperature, form)
    tile_elements = tile_elements or TILE_ELEMENTS.get(hidden.device.type, TILE_ELEMENTS["cpu"])
    return TokenScores(*_Score.apply(hidden, head, targets, details, reference, needs_grad, tile_elements))


class _Head:
    """A head, and the dtype that its products are computed in: its own on CUDA, else float32."""

    def __init__(self, weight_VH: Tensor, bias_V: Tensor | None, temperature: float, form: LogitForm) -> None:
        self._weight_VH = weight_VH.detach()
        self.bias_V = None if bias_V is None else bias_V.float().clamp(min=_LEAST_LOGIT)
        self.divisor = temperature / form.scale
        """Of the products, where they are not capped; of the score vectors always."""
        self._cap = None if form.cap is None else form.cap / temperature
        self.size = len(weight_VH)
        self.dtype = weight_VH.dtype if weight_VH.is_cuda else torch.float32

    def weight(self, part: slice) -> Tensor:
        """(v, H) of a tile."""
        return self._weight_VH[part].to(self.dtype)

    def logits(self, hidden_nH: Tensor, part: slice, out_nv: Tensor | None = None) -> Tensor:
        """float32 logits over the temperature, (n, v), into ``out_nv`` where it is given and its dtype allows."""
        hidden_nH, weight_vH = hidden_nH.detach().to(self.dtype), self.weight(part)
        if self.dtype == torch.float32:
            logits_nv = torch.mm(hidden_nH, weight_vH.T, out=out_nv)
        else:
            logits_nv = torch.mm(hidden_nH, weight_vH.T, out_dtype=torch.float32)
        return self._finished(logits_nv, part)

    def chosen(self, hidden_nH: Tensor, targets_n: Tensor) -> Tensor:
        """The logits of ``targets_n`` alone, (n,) float32."""
        products_nH = hidden_nH.detach().to(self.dtype).float() * self.rows(targets_n)
        return self._finished(products_nH.sum(1), targets_n)

    def rows(self, targets_n: Tensor) -> Tensor:
        """W[y], (n, H) float32."""
        return self._weight_VH[targets_n].float()

    def mix_into(self, sums_nH: Tensor, shares_nv: Tensor, part: slice) -> None:
        """Add the rows of a tile, each as often as ``shares_nv`` says, to (n, H) float32."""
        if self.dtype == torch.float32:
            sums_nH.addmm_(shares_nv, self.weight(part))
        else:
            sums_nH += torch.mm(shares_nv.to(self.dtype), self.weight(part), out_dtype=torch.float32)

    def _finished(self, logits: Tensor, words: slice | Tensor) -> Tensor:
        if self.bias_V is not None:
            logits += self.bias_V[words]
        logits = logits.div_(self.divisor) if self.divisor != 1 else logits
        return logits if self._cap is None else logits.div_(self._cap).tanh_().mul_(self._cap)

    @property
    def is_capped(self) -> bool:
        """Whether logits differ in :meth:`steepness`."""
        return self._cap is not None

    def steepness(self, logits: Tensor, out: Tensor | None = None) -> Tensor:
        """d logit / d product times ``divisor``, of the same shape, for a head that is capped."""
        return torch.div(logits, self._cap, out=out).square_().neg_().add_(1)


class _Buffers:
    """float32 space for a tile, one for each name, used by every tile again."""

    def __init__(self, elements: int, device: torch.device) -> None:
        self._elements, self._device = elements, device
        self._held: dict[str, Tensor] = {}

    def get(self, name: str, rows: int, columns: int) -> Tensor:
        if name not in self._held:
            self._held[name] = torch.empty(self._elements, device=self._device)
        return self._held[name][: rows * columns].view(rows, columns)


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, details, reference, needs_grad, tile_elements):
        count = hidden.shape[0]
        rows, columns = _tile_shape(count, head.size, tile_elements)
        buffers = _Buffers(rows * columns, hidden.device)
        outputs = _empty_outputs(count, hidden.device, details, reference is not None)
        directions = hidden.new_zeros(hidden.shape, dtype=torch.float32) if needs_grad else None
        for part in _parts(count, rows):
            block = _Block(
                (head, hidden[part]),
                None if reference is None else (reference[1], reference[0][part]),
                targets[part],
                {name: values[part] for name, values in outputs.items()},
                None if directions is None else directions[part],
                buffers,
            )
            for tile in _parts(head.size, columns):
                block.add(tile)
            block.finish()
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


def _tile_shape(num_tokens: int, vocabulary: int, elements: int) -> tuple[int, int]:
    """Tokens and vocabulary of a tile, such that all tiles are of about one size."""
    rows = _even(num_tokens, max(_LEAST_ROWS, elements // vocabulary))
    columns = _even(vocabulary, max(1, elements // rows))
    return rows, min(vocabulary, math.ceil(columns / _ALIGNED) * _ALIGNED if columns > _ALIGNED else columns)


def _even(total: int, most: int) -> int:
    return max(1, math.ceil(total / math.ceil(max(total, 1) / most)))


def _parts(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


class _Softmax:
    """Of one model at n tokens: its highest logit so far, and the sum of exponentials below it."""

    def __init__(self, head: _Head, hidden_nH: Tensor, targets_n: Tensor) -> None:
        self.head, self._hidden_nH, self._targets_n = head, hidden_nH, targets_n
        self.chosen_n = head.chosen(hidden_nH, targets_n)
        self.peak_n = torch.full_like(self.chosen_n, torch.finfo(torch.float32).min)
        self.total_n = torch.zeros_like(self.chosen_n)

    def logits(self, tile: slice, out_nv: Tensor) -> Tensor:
        """(n, v); those of the targets are ``chosen_n`` to the last bit."""
        logits_nv = self.head.logits(self._hidden_nH, tile, out_nv)
        places_n = self._targets_n - tile.start
        inside_n = (places_n >= 0) & (places_n < logits_nv.shape[1])
        places_n1 = places_n.clamp_(0, logits_nv.shape[1] - 1)[:, None]
        found_n = logits_nv.gather(1, places_n1).squeeze(1)
        return logits_nv.scatter_(1, places_n1, torch.where(inside_n, self.chosen_n, found_n)[:, None])

    def shift(self, logits_nv: Tensor) -> Tensor:
        """Make ``logits_nv`` relative to the highest logit, this tile's included; (n,), how far that moved, <= 0."""
        peak_n = torch.maximum(self.peak_n, logits_nv.amax(1))
        moved_n = (self.peak_n - peak_n).clamp_(min=_LEAST_LOGIT)
        self.peak_n = peak_n
        self.total_n *= moved_n.exp()
        logits_nv.sub_(peak_n[:, None])
        return moved_n

    def logps(self) -> Tensor:
        return self.chosen_n - self.peak_n - self.total_n.log()


class _Block:
    """A block of tokens whose sums over the vocabulary grow tile by tile.

    Sums are torch's, which adds in a tree: a matrix product adds in order, and in float32 it loses the many small terms
    of a long row.
    """

    def __init__(self, policy, reference, targets_n, out: dict[str, Tensor], direction_nH, buffers: _Buffers) -> None:
        self._policy = _Softmax(*policy, targets_n)
        self._reference = None if reference is None else _Softmax(*reference, targets_n)
        self._targets_n, self._out, self._buffers = targets_n, out, buffers
        self._mean_nH = direction_nH
        zeros_n = torch.zeros_like(self._policy.total_n)
        self._first_n, self._second_n, self._cross_n = zeros_n, zeros_n.clone(), zeros_n.clone()

    def add(self, tile: slice) -> None:
        """Take in a tile of the vocabulary."""
        policy, shape = self._policy, (len(self._targets_n), tile.stop - tile.start)
        shifted_nv = policy.logits(tile, self._buffers.get("policy", *shape))
        if "ranks" in self._out:
            self._out["ranks"] += (shifted_nv > policy.chosen_n[:, None]).sum(1)
        steep_nv = None
        if self._mean_nH is not None and policy.head.is_capped:
            steep_nv = policy.head.steepness(shifted_nv, self._buffers.get("product", *shape))
        self._move(policy.shift(shifted_nv))
        exp_nv = torch.exp(shifted_nv, out=self._buffers.get("exp", *shape))
        if self._mean_nH is not None:
            policy.head.mix_into(self._mean_nH, exp_nv if steep_nv is None else steep_nv.mul_(exp_nv), tile)
        if self._reference is not None:
            self._add_reference(tile, exp_nv)
        policy.total_n += exp_nv.sum(1)
        product_nv = exp_nv.mul_(shifted_nv)
        self._first_n += product_nv.sum(1)
        if "varentropies" in self._out:
            self._second_n += product_nv.mul_(shifted_nv).sum(1)

    def _move(self, moved_n: Tensor) -> None:
        """The sums so far, relative to a highest logit that moved by ``moved_n``."""
        factor_n, total_n = moved_n.exp(), self._policy.total_n
        first_n = factor_n * self._first_n
        self._second_n = factor_n * self._second_n + moved_n * (2 * first_n + moved_n * total_n)
        self._first_n = first_n + moved_n * total_n
        self._cross_n *= factor_n
        if self._mean_nH is not None:
            self._mean_nH *= factor_n[:, None]

    def _add_reference(self, tile: slice, exp_nv: Tensor) -> None:
        reference = self._reference
        ref_nv = reference.logits(tile, self._buffers.get("reference", *exp_nv.shape))
        moved_n = reference.shift(ref_nv)
        # The sum of p (z_ref - highest), whose tiles so far move with the highest logit of the reference.
        self._cross_n += moved_n * self._policy.total_n
        self._cross_n += torch.mul(exp_nv, ref_nv, out=self._buffers.get("product", *exp_nv.shape)).sum(1)
        reference.total_n += ref_nv.exp_().sum(1)

    def finish(self) -> None:
        """What the sums say, into the outputs."""
        out, policy, reference = self._out, self._policy, self._reference
        log_total_n, mean_first_n = policy.total_n.log(), self._first_n / policy.total_n
        out["logps"].copy_(policy.logps())
        torch.sub(log_total_n, mean_first_n, out=out["entropies"]).clamp_(min=0)
        torch.reciprocal(policy.total_n, out=out["top_probs"])
        if reference is not None:
            out["ref_logps"].copy_(reference.logps())
            # sum p (log p - log q): the log-normalisers once, the shifted logits under p.
            apart_n = mean_first_n - log_total_n - self._cross_n / policy.total_n + reference.total_n.log()
            out["kls"].copy_(apart_n).clamp_(min=0)
        if self._mean_nH is not None:
            chosen_nH = policy.head.rows(self._targets_n)
            if policy.head.is_capped:
                chosen_nH *= policy.head.steepness(policy.chosen_n)[:, None]
            self._mean_nH.div_(-policy.total_n[:, None]).add_(chosen_nH).div_(policy.head.divisor)
            torch.linalg.vector_norm(self._mean_nH, dim=1, out=out["leverage_norms"])
        if "varentropies" in out:
            second_n = self._second_n / policy.total_n
            torch.sub(second_n, mean_first_n.square(), out=out["varentropies"]).clamp_(min=0)


@torch.no_grad()
def top_alternatives(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    form: LogitForm = LogitForm(),
) -> tuple[Tensor, Tensor]:
    """The k most likely tokens of each position: ids (N, k) int64 and log-probabilities (N, k) float32."""
    head = _Head(weight, bias, temperature, form)
    ids = [hidden.new_zeros((0, k), dtype=torch.int64)]
    logps = [hidden.new_zeros((0, k), dtype=torch.float32)]
    for part in _parts(len(hidden), max(1, _ALTERNATIVES_ELEMENTS // head.size)):
        logits_nV = head.logits(hidden[part], slice(0, head.size))
        best = logits_nV.topk(k, dim=1)
        ids.append(best.indices)
        logps.append(best.values - logits_nV.logsumexp(1, keepdim=True))
    return torch.cat(ids), torch.cat(logps)
