"""What is recorded of each micro-batch: ERPO's diagnostics, and the invariants of eq. 16 as the optimiser got them."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from erpo_core.loss import LossTerms

if TYPE_CHECKING:
    from erpo_core.trainer.batches import MicroBatch, Scored


@torch.no_grad()
def signal_metrics(
    batch: "MicroBatch", scored: "Scored", terms: LossTerms, group_size: int, noise_floor: float
) -> dict[str, float]:
    """{metric name: value}; NaN where there is nothing to measure."""
    mask = batch.rollouts.mask
    entropies, signals = scored.entropies[mask], scored.signals
    kl = terms.kl[mask]
    found = {
        "entropy": _mean(entropies),
        "entropy/p95": _quantile(entropies, 0.95),
        "kl": _mean(kl),
        "clip_ratio": _mean(terms.clipped[mask].float()),
        "erpo/max_abs_advantage": scored.advantages.abs().max().item(),
        **_lengths(batch, mask),
        **_groups(batch, signals, mask, group_size),
        **_progress(signals, mask, noise_floor, group_size),
        **_gates(signals.gates[mask], entropies),
        **_flips(signals, scored.advantages, mask),
        **_invariants(scored.advantages, signals, mask, group_size),
    }
    top = entropies >= torch.quantile(entropies, 0.8) if len(entropies) else entropies.bool()
    credit = scored.advantages[mask].abs()
    found["erpo/credit_on_top20_entropy"] = (
        (credit[top].sum() / credit.sum()).item() if credit.sum() > 0 else float("nan")
    )
    return found


def _mean(values: Tensor) -> float:
    return values.mean().item() if len(values) else float("nan")


def _quantile(values: Tensor, q: float) -> float:
    return torch.quantile(values, q).item() if len(values) else float("nan")


def _lengths(batch: "MicroBatch", mask: Tensor) -> dict[str, float]:
    lengths, right = mask.sum(1).float(), batch.outcomes > 0
    ratio = float("nan")
    if right.any() and (~right).any():
        ratio = (lengths[right].mean() / lengths[~right].mean()).item()
    return {"completions/right_wrong_length_ratio": ratio}


def _groups(batch: "MicroBatch", signals, mask: Tensor, group_size: int) -> dict[str, float]:
    live = signals.group_advantages.view(-1, group_size).abs().sum(1) > 0
    heard = scored_groups(signals.advantages, group_size)
    outcomes = batch.outcomes.view(-1, group_size)
    right, wrong = (outcomes > 0).all(1), (outcomes <= 0).all(1)
    return {
        "erpo/frac_dead_groups": _mean((~live).float()),
        "erpo/frac_no_contrast": _mean((live & ~heard).float()),
        "erpo/frac_all_right": _mean(right.float()),
        "erpo/frac_all_wrong": _mean(wrong.float()),
        "erpo/frac_live_by_shaping": _mean((live & (right | wrong)).float()),
    }


def scored_groups(advantages: Tensor, group_size: int) -> Tensor:
    """(N,) bool: groups with any advantage."""
    return advantages.abs().sum(1).view(-1, group_size).sum(1) > 0


def _progress(signals, mask: Tensor, noise_floor: float, group_size: int) -> dict[str, float]:
    progress = signals.progress[mask]
    std = progress.std(correction=0).item() if len(progress) else float("nan")
    normalized = signals.normalized_progress
    buckets = signals.buckets + 1
    group = torch.arange(len(mask), device=mask.device)[:, None] // group_size
    key = (group * (buckets.max() + 1) + buckets)[mask]
    _, inverse = key.unique(return_inverse=True)
    loudest = torch.zeros(int(inverse.max()) + 1 if len(inverse) else 1, device=mask.device)
    loudest.scatter_reduce_(0, inverse, normalized[mask].abs().float(), "amax")
    psi = signals.psi[mask & (signals.group_advantages != 0)[:, None]]
    return {
        "erpo/progress_std": std,
        "erpo/progress_snr": 2 * std / noise_floor,
        "erpo/frac_silent_buckets": _mean((loudest == 0).float()),
        "erpo/psi_std": psi.std(correction=0).item() if len(psi) else float("nan"),
    }


def _gates(gates: Tensor, entropies: Tensor) -> dict[str, float]:
    if not len(gates):
        return {"erpo/gate_mean_top5": float("nan"), "erpo/gate_mean_bottom5": float("nan")}
    count = max(1, round(0.05 * len(gates)))
    order = entropies.argsort()
    return {"erpo/gate_mean_top5": _mean(gates[order[-count:]]), "erpo/gate_mean_bottom5": _mean(gates[order[:count]])}


def _flips(signals, advantages: Tensor, mask: Tensor) -> dict[str, float]:
    """Share of tokens whose advantage has the other sign than their answer's, right and wrong answers apart."""
    group = signals.group_advantages[:, None]
    right, wrong = mask & (group > 0), mask & (group < 0)
    return {
        "erpo/share_flipped_right": _mean((advantages[right] < 0).float()),
        "erpo/share_flipped_wrong": _mean((advantages[wrong] > 0).float()),
    }


def _invariants(advantages: Tensor, signals, mask: Tensor, group_size: int) -> dict[str, float]:
    """Eq. 16 on the live groups, after clipping: |sum A^| per token, and how far the variance is from 1."""
    tokens = mask.view(-1, group_size * mask.shape[1])
    grouped = advantages.reshape(tokens.shape)
    heard = scored_groups(signals.advantages, group_size)
    if not heard.any():
        return {"erpo/advantage_sum_residual": 0.0, "erpo/advantage_var_residual": 0.0}
    count = tokens.sum(1).clamp(min=1)
    mean = grouped.sum(1) / count
    variance = grouped.square().sum(1) / count - mean.square()
    return {
        "erpo/advantage_sum_residual": mean[heard].abs().max().item(),
        "erpo/advantage_var_residual": (variance[heard] - 1).abs().max().item(),
    }
