"""The loss of eqs. 4 and 5 on given token advantages."""

# R = ranks, L = responses of a rank, B = responses, T = tokens, G = responses a group

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossTerms:
    """``loss`` carries gradient; the others, (B, T), are for the records."""

    loss: Tensor
    kl: Tensor
    """The k3 estimate."""
    clipped_low: Tensor
    """bool: the ratio is below 1 - epsilon and the advantage negative, so there is no gradient."""
    clipped_high: Tensor


def response_weights(
    lengths: Tensor, rank: int, *, loss_type: str, num_generations: int, micro_batch: int, accumulation: int
) -> Tensor:
    """(L,) float32: the weight of each token of this rank's responses; an optimizer step's tokens sum to 1.

    ``erpo``: 1 / (groups in the step x tokens of the group), eq. 5. ``dapo``: 1 / tokens in the step. ``grpo``:
    1 / (responses in the step x tokens of the response). ``bnpo``: 1 / tokens of the micro-batch, weighted by its share
    of the responses. Steps, groups and tokens are those of all ranks, however they are laid out.

    Args:
        lengths: (R, L) active tokens of each response of a generation batch; groups follow one another rank by rank.
        rank: This one.
        loss_type: See above.
        num_generations: G, divides R x L.
        micro_batch: Responses of a rank's micro-batch.
        accumulation: Micro-batches of an optimizer step.

    Raises:
        ValueError: ``loss_type`` is unknown.
    """
    lengths_RL = lengths.float()
    place_L = torch.arange(lengths_RL.shape[1], device=lengths.device)
    step_L, part_L = place_L // (micro_batch * accumulation), place_L // micro_batch
    in_step_L = (step_L[:, None] == step_L).sum(1) * lengths_RL.shape[0]
    own_L = lengths_RL[rank]
    if loss_type == "erpo":
        tokens_RL = lengths_RL.view(-1, num_generations).sum(1).repeat_interleave(num_generations).view_as(lengths_RL)
        return 1 / (in_step_L / num_generations * tokens_RL[rank].clamp(min=1))
    if loss_type == "dapo":
        tokens_L = _sums_by(step_L, lengths_RL.sum(0))
        return 1 / tokens_L.clamp(min=1)
    if loss_type == "grpo":
        return 1 / (in_step_L * own_L.clamp(min=1))
    if loss_type == "bnpo":
        share_L = (part_L[:, None] == part_L).sum(1) / in_step_L
        return share_L / _sums_by(part_L, own_L).clamp(min=1)
    raise ValueError(f"loss_type: {loss_type!r} is none of erpo, dapo, bnpo, grpo")


def _sums_by(keys: Tensor, values: Tensor) -> Tensor:
    """For each place the sum of the values that have its key."""
    return torch.zeros_like(values).index_add(0, keys, values)[keys]


def top_entropy_mask(entropies: Tensor, mask: Tensor, share: float) -> Tensor:
    """(B, T) bool: the active tokens whose entropy is at or above the (1 - share) quantile of all active ones.

    As TRL's ``top_entropy_quantile`` (arXiv 2506.01939): over a micro-batch, that of all ranks, so it depends on what
    shares one.
    """
    active_BT = mask.bool()
    if share >= 1 or not active_BT.any():
        return active_BT
    return active_BT & (entropies >= torch.quantile(entropies[active_BT].float(), 1 - share))


def importance_ratios(
    logps: Tensor, engine_logps: Tensor, *, mode: str, clip_min: float | None, clip_max: float | None
) -> tuple[Tensor, Tensor]:
    """Ratios pi_trainer / pi_engine of the sampled tokens, within bounds, and which were outside, both (B, T).

    Factors of the advantage, constants in the gradient: what an engine samples is not exactly the policy that is
    trained. As TRL's ``vllm_importance_sampling_correction`` at token level.

    Args:
        logps: (B, T), the trainer's, of the policy that sampled.
        engine_logps: (B, T), the engine's; NaN where it gave none: the ratio is 1.
        mode: ``token_truncate`` puts a ratio outside at its bound, ``token_mask`` at 0.
        clip_min: Lower bound; None has none.
        clip_max: Upper bound; None has none.
    """
    gap_BT = logps.detach() - engine_logps
    ratio_BT = torch.where(gap_BT.isnan(), 0.0, gap_BT).exp()
    bounded_BT = ratio_BT.clamp(clip_min or 0.0, clip_max)
    outside_BT = bounded_BT != ratio_BT
    return (bounded_BT if mode == "token_truncate" else ratio_BT.masked_fill(outside_BT, 0.0)), outside_BT


def erpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    *,
    epsilon: float,
    epsilon_high: float,
    beta: float,
) -> LossTerms:
    """Clipped surrogate with token advantages, plus ``beta`` times the k3 estimator of KL(pi || pi_ref).

    Args:
        logps: (B, T), with gradient.
        old_logps: (B, T), of the policy that sampled; equal to ``logps`` in value where the step is on-policy.
        ref_logps: (B, T), or None where no reference was scored.
        advantages: (B, T), constants.
        weights: (B, T), see :func:`response_weights`; 0 where a token does not count.
    """
    active_BT = weights > 0
    ratio_BT = torch.where(active_BT, logps - old_logps, 0.0).exp()
    bounded_BT = ratio_BT.clamp(1 - epsilon, 1 + epsilon_high)
    surrogate_BT = torch.minimum(ratio_BT * advantages, bounded_BT * advantages)
    kl_BT = torch.zeros_like(ratio_BT)
    if ref_logps is not None:
        # Clamped: one token with a difference of 90 nats would make the whole step infinite.
        gap_BT = torch.where(active_BT, ref_logps - logps, 0.0).clamp(-20, 20)
        kl_BT = gap_BT.exp() - gap_BT - 1
    loss = ((beta * kl_BT - surrogate_BT) * weights).sum()
    return LossTerms(
        loss,
        kl_BT.detach(),
        active_BT & (ratio_BT < 1 - epsilon) & (advantages < 0),
        active_BT & (ratio_BT > 1 + epsilon_high) & (advantages > 0),
    )
