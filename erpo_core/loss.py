"""The loss of eqs. 4 and 5 on given token advantages."""

# B = responses, T = tokens, G = responses a group

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossTerms:
    """``loss`` carries gradient; ``kl`` (k3, B x T) and ``clipped`` (bool, B x T) are for the records."""

    loss: Tensor
    kl: Tensor
    clipped: Tensor


def token_weights(
    mask: Tensor, *, loss_type: str, num_generations: int, groups_in_step: int, tokens_in_step: int
) -> Tensor:
    """(B, T) float32 weights of a micro-batch's tokens; over the whole optimizer step they sum to about 1.

    ``erpo``: 1 / (groups in the step x active tokens of the group), eq. 5. ``dapo``: 1 / tokens in the step. ``bnpo``:
    1 / tokens of the micro-batch, weighted by its share of the groups. ``grpo``: 1 / (responses in the step x tokens
    of the response).

    Raises:
        ValueError: ``loss_type`` is unknown.
    """
    active_BT = mask.float()
    share = active_BT.shape[0] / num_generations / groups_in_step
    if loss_type == "erpo":
        tokens_N = active_BT.sum(1).view(-1, num_generations).sum(1).clamp(min=1)
        return active_BT / (groups_in_step * tokens_N.repeat_interleave(num_generations))[:, None]
    if loss_type == "dapo":
        return active_BT / max(tokens_in_step, 1)
    if loss_type == "bnpo":
        return active_BT * share / active_BT.sum().clamp(min=1)
    if loss_type == "grpo":
        return active_BT / (groups_in_step * num_generations * active_BT.sum(1, keepdim=True).clamp(min=1))
    raise ValueError(f"loss_type: {loss_type!r} is none of erpo, dapo, bnpo, grpo")


def top_entropy_mask(entropies: Tensor, mask: Tensor, share: float) -> Tensor:
    """(B, T) bool: the active tokens whose entropy is at or above the (1 - share) quantile of all active ones.

    As TRL's ``top_entropy_quantile`` (arXiv 2506.01939): over a micro-batch, so it depends on what shares one.
    """
    active_BT = mask.bool()
    if share >= 1 or not active_BT.any():
        return active_BT
    return active_BT & (entropies >= torch.quantile(entropies[active_BT].float(), 1 - share))


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
        ref_logps: (B, T) or None where ``beta`` is 0.
        advantages: (B, T), constants.
        weights: (B, T) of :func:`token_weights`; 0 where a token does not count.
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
    clipped_BT = ((ratio_BT < 1 - epsilon) & (advantages < 0)) | ((ratio_BT > 1 + epsilon_high) & (advantages > 0))
    return LossTerms(loss, kl_BT.detach(), clipped_BT & active_BT)
