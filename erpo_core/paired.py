"""Two conditions on the same problems: what differs, how surely, and what could have been seen. Numpy alone.

The unit is the problem. Several outcomes of one problem are not independent: they become its mean before anything here.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from erpo_core.passk import bootstrap_interval

_ENUMERATED_BITS = 13
"""Sign patterns of up to 13 problems are all counted."""


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test: problems that only one of the two solves are fair coin flips.

    Raises:
        ValueError: a negative count.
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"mcnemar_exact: {only_first} and {only_second}")
    flips = only_first + only_second
    tail = sum(math.comb(flips, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**flips)


def sign_flip_exact(differences: Sequence[int]) -> float:
    """Two-sided exact p-value of the paired permutation test: under "no difference" each sign is a fair coin flip.

    With differences of -1, 0 and 1 this is McNemar's exact test.

    Args:
        differences: (P,) whole numbers, for example right answers of one model less those of the other.
    """
    sizes = np.abs(np.asarray(differences, dtype=np.int64))
    reach, observed = int(sizes.sum()), abs(int(np.sum(differences, dtype=np.int64)))
    chances = np.zeros(2 * reach + 1)  # chances[reach + s]: of the sum s
    chances[reach] = 1.0
    for size in sizes[sizes > 0]:
        # What wraps around is 0: no sum lies beyond the reach.
        chances = (np.roll(chances, size) + np.roll(chances, -size)) / 2
    return min(1.0, float(chances[: reach - observed + 1].sum() + chances[reach + observed :].sum()))


def sign_flip_test(differences: Sequence[float], *, resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of a mean difference of zero, by flipping the signs of the problems' differences.

    All patterns are counted for up to 13 problems; otherwise (1 + as extreme) / (1 + ``resamples``) of random ones.

    Raises:
        ValueError: no difference.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not len(values):
        raise ValueError("sign_flip_test: no problem")
    observed = abs(values.sum()) - 1e-9 * max(1.0, np.abs(values).sum())
    values = values[values != 0]  # flipping a zero changes nothing
    if len(values) <= _ENUMERATED_BITS:
        patterns = np.arange(2 ** len(values))[:, None] >> np.arange(len(values)) & 1
        return float((np.abs((1 - 2 * patterns) @ values) >= observed).mean())
    draw = np.random.default_rng(seed)
    extreme = 0
    for start in range(0, resamples, 1000):
        signs = 1 - 2 * draw.integers(2, size=(min(1000, resamples - start), len(values)))
        extreme += int((np.abs(signs @ values) >= observed).sum())
    return (1 + extreme) / (1 + resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of Holm (1979): rejecting those at most alpha keeps the chance of any false one at alpha."""
    order = np.argsort(p_values, kind="stable")
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * float(p_values[index])))
        adjusted[index] = worst
    return adjusted


def paired_difference(
    first: Sequence[float], second: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> dict[str, float]:
    """Mean of ``second - first`` over problems, with a 95% bootstrap interval over problems.

    Args:
        first, second: (P,) one value for each problem, in the same order.
        resamples: Draws of the bootstrap.
        seed: Of those.

    Raises:
        ValueError: lengths differ, or there is no problem.
    """
    if len(first) != len(second):
        raise ValueError(f"paired_difference: {len(first)} and {len(second)} problems")
    differences = np.subtract(second, first, dtype=np.float64)
    low, high = bootstrap_interval(differences, resamples=resamples, seed=seed)
    return {"value": float(differences.mean()), "low": low, "high": high}


def minimum_detectable(differences: Sequence[float], *, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """The mean difference that as many problems of this spread show with ``power`` at two-sided ``alpha``.

    The spread is taken as if one more problem had differed by 1, so that complete agreement does not look like
    unlimited power. None where even the most extreme outcome would not be significant (fewer than 6 problems at 0.05).
    """
    values = np.asarray(differences, dtype=np.float64)
    if not len(values) or 2.0 ** (1 - len(values)) > alpha:
        return None
    spread = math.sqrt((((values - values.mean()) ** 2).sum() + 1) / len(values))
    quantile = NormalDist().inv_cdf
    return min(1.0, (quantile(1 - alpha / 2) + quantile(power)) * spread / math.sqrt(len(values)))
