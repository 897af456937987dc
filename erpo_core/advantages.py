"""Token advantages of ERPO (arXiv 2603.28204, eqs. 3 and 7-10) as one pure function of tensors."""

# B = responses, T = tokens, G = responses a group, N = groups, K = buckets, L = G * T tokens of a group

from dataclasses import dataclass

import torch
from torch import Tensor

REWARD_STABILIZER = 1e-4
RELATIVE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class ERPOSignals:
    """Every term of eqs. 3 and 7-10. (B,) and (B, T) on the inputs' device; (B, T) terms are 0 where the mask is 0."""

    group_advantages: Tensor
    gates: Tensor
    progress: Tensor
    normalized_progress: Tensor
    psi: Tensor
    advantages: Tensor
    buckets: Tensor


@torch.no_grad()
def erpo_advantages(
    entropies: Tensor,
    logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor,
    rewards: Tensor,
    *,
    num_generations: int,
    num_buckets: int = 10,
    gate_scale: float = 1.0,
    progress_scale: float = 1.0,
    synthesis_weight: float = 0.5,
    psi_std: float = 1.0,
    stabilizer: float = 1e-6,
    progress_noise_floor: float = 1e-6,
    entropy_mean: float | None = None,
    entropy_std: float | None = None,
    gate: bool = True,
    anchor: bool = True,
    norm: bool = True,
) -> ERPOSignals:
    """Token advantages of whole groups: ``num_generations`` adjacent rows each; groups never see each other.

    Statistics are sums over a group's active tokens in one row of (N, L): float32, or float64 where an input is. The
    result is detached, does not depend on padding, and is 0 throughout a group whose rewards do not differ.

    Args:
        entropies: (B, T) nats, H of the distribution that each token was drawn from, >= 0.
        logps: (B, T) nats, log pi_theta of each token.
        ref_logps: (B, T) nats, log pi_ref of each token, scored by the same implementation.
        mask: (B, T) bool or int, 1 where a token is trained on. Values elsewhere are never read, NaN included.
        rewards: (B,) R_i; NaN leaves its response out of the group.
        num_generations: G.
        num_buckets: K, relative-position buckets of a response; 1 normalises over the whole group.
        gate_scale: gamma of eq. 8.
        progress_scale: beta_progress of eq. 9.
        synthesis_weight: eta of eq. 10; 0 leaves GRPO's advantage, normalised again.
        psi_std: sigma_target, the spread of psi inside a group before synthesis.
        stabilizer: delta of eqs. 8-10 (eq. 3 has its own: 1e-4, as TRL).
        progress_noise_floor: nats; a bucket whose progress varies no more than this is silent (z = 0).
        entropy_mean: nats, replaces the group's mean in eq. 8 (a moving average); None takes the group's.
        entropy_std: nats, likewise.
        gate: False sets every gate to 1 (ablation).
        anchor: False drops sign(A_i) from eq. 10 (ablation).
        norm: False returns the sum before Norm_G (ablation).

    Raises:
        ValueError: shapes disagree, G does not divide B, K < 1, or an active entropy is NaN or below -1e-4.
    """
    _check_shapes(entropies, logps, ref_logps, mask, rewards, num_generations, num_buckets)
    dtype = torch.promote_types(torch.float32, torch.promote_types(entropies.dtype, logps.dtype))
    groups, tokens = rewards.shape[0] // num_generations, mask.shape[1]
    if not mask.numel():
        return _no_signals(rewards.to(dtype), mask)
    rewards_NG = rewards.to(dtype).reshape(groups, num_generations)
    scored_NG = ~rewards_NG.isnan()
    active_NGT = mask.bool().reshape(groups, num_generations, tokens) & scored_NG[:, :, None]
    active_NL = active_NGT.flatten(1)

    def shaped(values: Tensor) -> Tensor:
        return torch.where(active_NL, values.to(dtype).reshape(groups, -1), 0.0)

    entropies_NL, progress_NL = shaped(entropies), progress_scale * (shaped(logps) - shaped(ref_logps))
    _check_entropies(entropies_NL)
    entropies_NL = entropies_NL.clamp(min=0)

    a_NG = _group_advantages(rewards_NG, scored_NG)
    live_N = has_contrast(rewards_NG, scored_NG) & has_contrast(rewards_NG, active_NGT.any(2))
    a_NL = torch.where(active_NL, a_NG[:, :, None].expand(-1, -1, tokens).flatten(1), 0.0)

    gates_NL = _gates(entropies_NL, active_NL, gate_scale, stabilizer, entropy_mean, entropy_std, gate)
    buckets_NL = _buckets(active_NGT, num_buckets)
    normalized_NL = _normalize_in_buckets(
        progress_NL, active_NL, buckets_NL, num_buckets, stabilizer, progress_noise_floor
    )
    sign_NL = a_NL.sign() if anchor else (a_NL != 0).to(dtype)
    psi_NL = gates_NL * sign_NL * normalized_NL
    _, spread_N1 = _moments(psi_NL, active_NL & (a_NL != 0))
    psi_NL = torch.where(live_N[:, None], psi_std * psi_NL / (spread_N1 + stabilizer), 0.0)

    combined_NL = a_NL + synthesis_weight * psi_NL
    final_NL = _normalize_group(combined_NL, active_NL, stabilizer) if norm else combined_NL
    final_NL = torch.where(live_N[:, None] & active_NL, final_NL, 0.0)

    def back(values: Tensor) -> Tensor:
        return values.reshape(mask.shape)

    return ERPOSignals(
        group_advantages=a_NG.flatten(),
        gates=back(gates_NL),
        progress=back(progress_NL),
        normalized_progress=back(normalized_NL),
        psi=back(psi_NL),
        advantages=back(final_NL),
        buckets=back(buckets_NL),
    )


def _no_signals(rewards: Tensor, mask: Tensor) -> ERPOSignals:
    """Of responses without any token."""
    zeros = torch.zeros(mask.shape, dtype=rewards.dtype, device=mask.device)
    tokens = ("gates", "progress", "normalized_progress", "psi", "advantages")
    return ERPOSignals(group_advantages=torch.zeros_like(rewards), buckets=zeros.long(), **dict.fromkeys(tokens, zeros))


def _group_advantages(rewards_NG: Tensor, scored_NG: Tensor) -> Tensor:
    """Eq. 3 with Bessel's correction; exactly 0 where a reward differs from its group's mean by rounding alone.

    In float64: the squares of rewards of 1e19 and more are none of float32's numbers.
    """
    count_N1 = scored_NG.sum(1, keepdim=True)
    clean_NG = torch.where(scored_NG, rewards_NG, 0.0).double()
    mean_N1 = clean_NG.sum(1, keepdim=True) / count_N1.clamp(min=1)
    deviation_NG = torch.where(scored_NG, clean_NG - mean_N1, 0.0)
    std_N1 = (deviation_NG.square().sum(1, keepdim=True) / (count_N1 - 1).clamp(min=1)).sqrt()
    tolerance_N1 = RELATIVE_TOLERANCE * clean_NG.abs().amax(1, keepdim=True).clamp(min=1)
    signal_NG = (deviation_NG.abs() > tolerance_N1) & has_contrast(rewards_NG, scored_NG)[:, None]
    return torch.where(signal_NG, deviation_NG / (std_N1 + REWARD_STABILIZER), 0.0).to(rewards_NG.dtype)


def has_contrast(rewards_NG: Tensor, counted_NG: Tensor | None = None) -> Tensor:
    """(N,) bool: do the counted rewards of each group differ by more than rounding? All but NaN count by default."""
    counted_NG = ~rewards_NG.isnan() if counted_NG is None else counted_NG
    high_N = rewards_NG.masked_fill(~counted_NG, -torch.inf).amax(1)
    low_N = rewards_NG.masked_fill(~counted_NG, torch.inf).amin(1)
    scale_N = rewards_NG.nan_to_num(0.0).abs().amax(1).clamp(min=1)
    return counted_NG.any(1) & (high_N - low_N > RELATIVE_TOLERANCE * scale_N)


def without_shaping(rewards: Tensor, outcomes: Tensor, num_generations: int) -> Tensor:
    """(B,) rewards, all 0 in a group whose outcomes do not differ, so that it is dead; NaN stays NaN."""
    decided_N = has_contrast(outcomes.reshape(-1, num_generations))
    kept = decided_N.repeat_interleave(num_generations) | rewards.isnan()
    return torch.where(kept, rewards, 0.0)


def _moments(values_NL: Tensor, active_NL: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation over each group's active tokens, both (N, 1)."""
    count_N1 = active_NL.sum(1, keepdim=True).clamp(min=1)
    mean_N1 = torch.where(active_NL, values_NL, 0.0).sum(1, keepdim=True) / count_N1
    deviation_NL = torch.where(active_NL, values_NL - mean_N1, 0.0)
    return mean_N1, (deviation_NL.square().sum(1, keepdim=True) / count_N1).sqrt()


def _gates(entropies_NL, active_NL, gate_scale, stabilizer, mean, std, gate) -> Tensor:
    """Eq. 8. Without ``mean`` and ``std`` the statistics are those of the group's active tokens."""
    if not gate:
        return active_NL.to(entropies_NL.dtype)
    group_mean_N1, group_std_N1 = _moments(entropies_NL, active_NL)
    mean_N1 = group_mean_N1 if mean is None else mean
    std_N1 = group_std_N1 if std is None else std
    gates_NL = torch.sigmoid(gate_scale * (entropies_NL - mean_N1) / (std_N1 + stabilizer))
    return torch.where(active_NL, gates_NL, 0.0)


def _buckets(active_NGT: Tensor, num_buckets: int) -> Tensor:
    """floor(t K / n) for the t-th (from 0) of a response's n active tokens; -1 elsewhere. (N, L) int64."""
    rank_NGT = active_NGT.cumsum(2) - 1
    length_NG1 = active_NGT.sum(2, keepdim=True).clamp(min=1)
    return torch.where(active_NGT, rank_NGT * num_buckets // length_NG1, -1).flatten(1)


def _normalize_in_buckets(progress_NL, active_NL, buckets_NL, num_buckets, stabilizer, noise_floor) -> Tensor:
    """Eq. 9: z-scores inside each bucket of each group; 0 where a bucket has one token or no more spread than noise."""
    index_NL = buckets_NL.clamp(min=0)
    ones_NL = active_NL.to(progress_NL.dtype)

    def total(values_NL: Tensor) -> Tensor:
        zeros_NK = values_NL.new_zeros(values_NL.shape[0], num_buckets)
        return zeros_NK.scatter_add(1, index_NL, values_NL * ones_NL)

    count_NK = total(ones_NL)
    mean_NK = total(progress_NL) / count_NK.clamp(min=1)
    deviation_NL = (progress_NL - mean_NK.gather(1, index_NL)) * ones_NL
    std_NK = (total(deviation_NL.square()) / count_NK.clamp(min=1)).sqrt()
    heard_NK = (count_NK > 1) & (std_NK > noise_floor)
    z_NL = deviation_NL / (std_NK + stabilizer).gather(1, index_NL)
    return torch.where(heard_NK.gather(1, index_NL) & active_NL, z_NL, 0.0)


def _normalize_group(combined_NL: Tensor, active_NL: Tensor, stabilizer: float) -> Tensor:
    """Norm_G over the group's active tokens; 0 where they differ by rounding alone."""
    mean_N1, std_N1 = _moments(combined_NL, active_NL)
    high_N1 = combined_NL.masked_fill(~active_NL, -torch.inf).amax(1, keepdim=True)
    low_N1 = combined_NL.masked_fill(~active_NL, torch.inf).amin(1, keepdim=True)
    scale_N1 = torch.where(active_NL, combined_NL, 0.0).abs().amax(1, keepdim=True).clamp(min=1)
    varied_N1 = active_NL.any(1, keepdim=True) & (high_N1 - low_N1 > RELATIVE_TOLERANCE * scale_N1)
    return torch.where(varied_N1, (combined_NL - mean_N1) / (std_N1 + stabilizer), 0.0)


def _check_shapes(entropies, logps, ref_logps, mask, rewards, num_generations: int, num_buckets: int) -> None:
    for name, value in (("entropies", entropies), ("logps", logps), ("ref_logps", ref_logps)):
        if value.shape != mask.shape:
            raise ValueError(f"{name}: shape {tuple(value.shape)} differs from mask's {tuple(mask.shape)}")
    if mask.ndim != 2:
        raise ValueError(f"mask: expected (B, T), got {tuple(mask.shape)}")
    if rewards.shape != mask.shape[:1]:
        raise ValueError(f"rewards: expected ({mask.shape[0]},), got {tuple(rewards.shape)}")
    if num_generations < 1 or mask.shape[0] % num_generations:
        raise ValueError(f"num_generations: {num_generations} does not divide the {mask.shape[0]} rows")
    if num_buckets < 1:
        raise ValueError("num_buckets: must be at least 1")


def _check_entropies(entropies_NL: Tensor) -> None:
    if entropies_NL.isnan().any() or (entropies_NL < -1e-4).any():
        raise ValueError("entropies: NaN or negative among the active tokens")
