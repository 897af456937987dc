"""What eqs. 11-15 of the paper say, corrected, by autograd on a small softmax policy (erpo-spec section 7)."""

import pytest
import torch

from erpo_core.advantages import erpo_advantages

G, T, V = 4, 7, 11
ETA, BETA, STABILIZER, BUCKETS = 0.5, 1.7, 1e-6, 3


def policy(seed: int) -> dict[str, torch.Tensor]:
    """A table of logits for each token of a group, float64; the sampled tokens; a reference; rewards."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    theta, lengths = normal(G, T, V).requires_grad_(), torch.tensor([7, 4, 6, 3])
    return {
        "theta": theta,
        "ref": (theta.detach() + 0.3 * normal(G, T, V)).log_softmax(2),
        "tokens": torch.randint(V, (G, T), generator=generator),
        "mask": torch.arange(T) < lengths[:, None],
        "rewards": torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64),
    }


def terms(case: dict[str, torch.Tensor]):
    """log pi of the sampled tokens with gradient, log pi_ref, and every signal of eqs. 3-10."""
    logs = case["theta"].log_softmax(2)
    logps = logs.gather(2, case["tokens"][..., None]).squeeze(2)
    ref = case["ref"].gather(2, case["tokens"][..., None]).squeeze(2)
    entropies = -(logs.exp() * logs).sum(2).detach()
    signals = erpo_advantages(
        entropies,
        logps.detach(),
        ref,
        case["mask"],
        case["rewards"],
        num_generations=G,
        num_buckets=BUCKETS,
        progress_scale=BETA,
        synthesis_weight=ETA,
        stabilizer=STABILIZER,
    )
    return logps, ref, signals


def gradient(objective: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(objective, theta, retain_graph=True)[0]


def bucket_moments(signals, mask) -> tuple[torch.Tensor, torch.Tensor]:
    """mu_k and sigma_k of each token's bucket."""
    mean, std = torch.zeros_like(signals.progress), torch.ones_like(signals.progress)
    for bucket in range(BUCKETS):
        here = signals.buckets == bucket
        mean[here] = signals.progress[here].mean()
        std[here] = signals.progress[here].std(correction=0)
    return mean, std


@pytest.mark.parametrize("seed", range(5))
def test_erpo_ascends_a_weighted_squared_log_ratio_beside_grpo(seed):
    case = policy(seed)
    logps, ref, signals = terms(case)
    mask, theta = case["mask"], case["theta"]
    a = signals.group_advantages[:, None] * mask
    combined = (a + ETA * signals.psi)[mask]
    mean, std = bucket_moments(signals, mask)
    # Psi = Lambda s~ with constants Lambda; Lambda' carries the bucket's spread.
    shaped = torch.where(signals.normalized_progress != 0, signals.psi / signals.normalized_progress, 0.0)
    squared = (logps - ref - mean / BETA).square()
    potential = 0.5 * BETA * (shaped / (std + STABILIZER) * squared)[mask].sum()
    found = gradient((signals.advantages * logps)[mask].sum(), theta)
    expected = (
        gradient((a * logps)[mask].sum(), theta)
        + ETA * gradient(potential, theta)
        - combined.mean() * gradient(logps[mask].sum(), theta)
    ) / (combined.std(correction=0) + STABILIZER)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-9)
    assert found.abs().max() > 0.01


@pytest.mark.parametrize("seed", range(5))
def test_eq_15_as_printed_holds_for_the_raw_progress_and_not_for_the_normalised_one(seed):
    case = policy(seed)
    logps, ref, signals = terms(case)
    mask, theta = case["mask"], case["theta"]
    shaped = torch.where(signals.normalized_progress != 0, signals.psi / signals.normalized_progress, 0.0)
    printed = gradient(0.5 * BETA * (shaped * (logps - ref).square())[mask].sum(), theta)
    with_raw = gradient((shaped * signals.progress * logps)[mask].sum(), theta)
    with_normalised = gradient((signals.psi * logps)[mask].sum(), theta)
    torch.testing.assert_close(printed, with_raw, atol=1e-10, rtol=1e-9)
    assert (printed - with_normalised).norm() > 0.1 * with_normalised.norm()
