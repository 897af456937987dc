"""What is recorded of a step: ERPO's diagnostics, and the invariants of eq. 16 as the optimiser got them."""

from collections.abc import Mapping, Sequence
from math import nan
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from erpo_core.loss import LossTerms
from erpo_core.rewards.verify import Verdict
from erpo_core.trainer.totals import Totals

if TYPE_CHECKING:
    from erpo_core.generation.base import Sample
    from erpo_core.trainer.batches import MicroBatch, Scored

OF_REFERENCE = ("kl", "kl/exact", "erpo/progress_std", "erpo/progress_snr", "erpo/psi_std", "erpo/frac_silent_buckets")
"""What means nothing where no reference was scored."""
_RATIO = "sampling/importance_sampling_ratio"
_MOMENTS = ("erpo/progress_std", "erpo/psi_std")
"""Counted as moments under the name of what they give."""


@torch.no_grad()
def count_batch(totals: Totals, batch: "MicroBatch", scored: "Scored", terms: LossTerms) -> None:
    """Count what the loss of a micro-batch saw."""
    mask, signals = batch.rollouts.mask, scored.signals
    totals.add_values("entropy", scored.entropies[mask])
    totals.add_values("kl", terms.kl[mask])
    if scored.kls is not None:
        totals.add_values("kl/exact", scored.kls[mask])
    totals.add_values("clip_ratio/low_mean", terms.clipped_low[mask])
    totals.add_values("clip_ratio/high_mean", terms.clipped_high[mask])
    totals.add_values("clip_ratio/region_mean", (terms.clipped_low | terms.clipped_high)[mask])
    totals.add("num_active_tokens", mask.sum().item(), 1)
    totals.add_tokens(scored.entropies[mask], scored.advantages[mask].abs(), signals.gates[mask])
    _count_progress(totals, signals, mask)
    _count_flips(totals, signals, scored.advantages, mask)
    _count_lengths(totals, batch, mask)


def count_completions(totals: Totals, samples: "Sequence[Sample]") -> None:
    """Count the lengths of the answers that are trained on, under TRL's names."""
    for name, kept in (("", samples), ("terminated_", [sample for sample in samples if sample.finished])):
        lengths = [len(sample.token_ids) for sample in kept]
        totals.add(f"completions/mean_{name}length", sum(lengths), len(lengths))
        for length in lengths:
            totals.low(f"completions/min_{name}length", length)
            totals.peak(f"completions/max_{name}length", length)
    totals.add("completions/clipped_ratio", sum(not sample.finished for sample in samples), len(samples))


def count_verdicts(totals: Totals, verdicts: Sequence[str | None]) -> None:
    """Count how the checks of some answers ended; None was not checked."""
    judged = [verdict for verdict in verdicts if verdict]
    for name in Verdict if judged else ():
        totals.add(f"verdict/{name}", judged.count(name), len(judged))


def count_rewards(totals: Totals, rewards: Tensor, by_function: Mapping[str, Tensor]) -> None:
    """Count the rewards of some answers, (B,), and those that each function gave; NaN was not judged."""
    totals.add_values("reward", rewards[~rewards.isnan()])
    totals.add_moments("reward_std", rewards[~rewards.isnan()])
    for name, values in by_function.items():
        totals.add_values(f"rewards/{name}", values[~values.isnan()])


@torch.no_grad()
def count_engine(totals: Totals, batch: "MicroBatch", scored: "Scored") -> None:
    """Count how far the engine's log-probabilities are from the trainer's, on the tokens that it gave them for."""
    apart = (scored.logps - batch.engine_logps).abs()[batch.rollouts.mask & ~batch.engine_logps.isnan()]
    totals.add_values("sampling/logp_difference_mean", apart)
    if len(apart):
        totals.peak("sampling/logp_difference_max", apart.max().item())


def count_ratios(totals: Totals, ratios: Tensor, clipped: Tensor) -> None:
    """Count the engine's importance ratios of some tokens, (n,), and which of them were out of bounds."""
    totals.add_values(f"{_RATIO}/mean", ratios)
    totals.add_values(f"{_RATIO}/clipped", clipped)
    if len(ratios):
        totals.low(f"{_RATIO}/min", ratios.min().item())
        totals.peak(f"{_RATIO}/max", ratios.max().item())


@torch.no_grad()
def count_groups(totals: Totals, rewards: Tensor, outcomes: Tensor, signals, mask: Tensor, group_size: int) -> None:
    """Count what holds of whole groups, B = N x G rows."""
    live = signals.group_advantages.view(-1, group_size).abs().sum(1) > 0
    heard = live_groups(signals.advantages, group_size)
    by_group = outcomes.view(-1, group_size)
    right, wrong = (by_group > 0).all(1), (by_group <= 0).all(1)
    spread = rewards.view(-1, group_size).std(1)
    totals.add_values("erpo/group_reward_std", spread[~spread.isnan()])
    totals.add_values("erpo/frac_dead_groups", ~live)
    totals.add_values("erpo/frac_no_contrast", live & ~heard)
    totals.add_values("erpo/frac_all_right", right)
    totals.add_values("erpo/frac_all_wrong", wrong)
    totals.add_values("erpo/frac_live_by_shaping", live & (right | wrong))
    _count_silence(totals, signals, mask, group_size)


@torch.no_grad()
def count_invariants(
    totals: Totals, name: str, advantages: Tensor, heard: Tensor, mask: Tensor, group_size: int
) -> None:
    """Eq. 16 on the groups that are heard: |sum A^| per token, and how far the variance is from 1."""
    tokens = mask.view(-1, group_size * mask.shape[1])
    grouped = advantages.reshape(tokens.shape).double()
    count = tokens.sum(1).clamp(min=1)
    mean = grouped.sum(1) / count
    variance = grouped.square().sum(1) / count - mean.square()
    for suffix, residual in (("sum", mean.abs()), ("var", (variance - 1).abs())):
        totals.peak(f"erpo/advantage_{suffix}_residual{name}", residual[heard].max().item() if heard.any() else 0.0)


def step_metrics(totals: Totals, noise: float) -> dict[str, float]:
    """{metric name: value}; NaN where there was nothing to measure. ``noise``: of the progress; NaN where unknown."""
    found = totals.means()
    for name in _MOMENTS:
        found[name] = totals.std(name)
    found["reward_std"] = totals.std("reward_std", correction=1)
    found["erpo/progress_noise"] = noise
    found["erpo/progress_snr"] = found["erpo/progress_std"] / noise if noise else nan
    lengths = [totals.mean(f"length/{side}") for side in ("right", "wrong")]
    found["completions/right_wrong_length_ratio"] = lengths[0] / lengths[1] if lengths[1] else nan
    # Where no answer ended by itself, TRL has 0.
    found = {"completions/min_terminated_length": nan, "completions/max_terminated_length": nan} | found
    found.pop("length/right", None)
    found.pop("length/wrong", None)
    return found | _of_tokens(*totals.tokens().unbind(1))


def live_groups(advantages: Tensor, group_size: int) -> Tensor:
    """(N,) bool: groups with any advantage."""
    return advantages.abs().sum(1).view(-1, group_size).sum(1) > 0


def _of_tokens(entropies: Tensor, credit: Tensor, gates: Tensor) -> dict[str, float]:
    names = ("entropy/p05", "entropy/p50", "entropy/p95")
    if not len(entropies):
        return dict.fromkeys(names, nan)
    order = entropies.argsort(stable=True)
    count = len(order)
    few, fifth = max(1, round(0.05 * count)), max(1, round(0.2 * count))
    ranked = entropies[order]
    total = credit.sum().item()
    return {
        **{
            name: ranked[min(count - 1, int(q * count))].item()
            for name, q in zip(names, (0.05, 0.5, 0.95), strict=True)
        },
        "erpo/credit_on_top20_entropy": credit[order[-fifth:]].sum().item() / total if total else nan,
        "erpo/max_abs_advantage": credit.max().item(),
        "erpo/gate_mean_top5": gates[order[-few:]].mean().item(),
        "erpo/gate_mean_bottom5": gates[order[:few]].mean().item(),
    }


def _count_progress(totals: Totals, signals, mask: Tensor) -> None:
    totals.add_moments("erpo/progress_std", signals.progress[mask])
    totals.add_moments("erpo/psi_std", signals.psi[mask & (signals.group_advantages != 0)[:, None]])


def _count_silence(totals: Totals, signals, mask: Tensor, group_size: int) -> None:
    """Buckets of a group in which no token has a normalised progress."""
    buckets = signals.buckets
    group = torch.arange(len(mask), device=mask.device)[:, None] // group_size
    key = (group * (buckets.max() + 1) + buckets)[mask]
    if not len(key):
        return
    _, inverse = key.unique(return_inverse=True)
    loudest = torch.zeros(int(inverse.max()) + 1, device=mask.device)
    loudest.scatter_reduce_(0, inverse, signals.normalized_progress[mask].abs().float(), "amax")
    totals.add_values("erpo/frac_silent_buckets", loudest == 0)


def _count_flips(totals: Totals, signals, advantages: Tensor, mask: Tensor) -> None:
    """Share of tokens whose advantage has the other sign than their answer's, right and wrong answers apart."""
    group = signals.group_advantages[:, None]
    totals.add_values("erpo/share_flipped_right", advantages[mask & (group > 0)] < 0)
    totals.add_values("erpo/share_flipped_wrong", advantages[mask & (group < 0)] > 0)


def _count_lengths(totals: Totals, batch: "MicroBatch", mask: Tensor) -> None:
    """An answer that nobody judged is neither right nor wrong."""
    lengths, judged, outcomes = mask.sum(1).float(), ~batch.rewards.isnan(), batch.outcomes
    totals.add_values("length/right", lengths[((outcomes > 0) & judged).to(mask.device)])
    totals.add_values("length/wrong", lengths[((outcomes <= 0) & judged).to(mask.device)])
