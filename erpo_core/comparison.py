"""Two models on the same problems: paired differences, exact tests, Holm's correction. Light: numpy alone.

Problems are the units: answers to one problem are not independent of each other, problems are taken to be.
"""

import math
from collections.abc import Sequence

import numpy as np

from erpo_core.passk import bootstrap_interval


def paired_difference(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> dict[str, float]:
    """Mean of ``second - first`` over problems, with a 95% bootstrap interval over problems.

    Args:
        first, second: (P,) one value for each problem, in the same order.

    Raises:
        ValueError: lengths differ, or there is no problem.
    """
    if len(first) != len(second):
        raise ValueError(f"paired_difference: {len(first)} and {len(second)} problems")
    differences = np.subtract(second, first, dtype=np.float64)
    low, high = bootstrap_interval(differences, seed=seed)
    return {"value": float(differences.mean()), "low": low, "high": high}


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


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of Holm (1979): rejecting those at most alpha keeps the chance of any false one at alpha."""
    order = np.argsort(p_values, kind="stable")
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * float(p_values[index])))
        adjusted[index] = worst
    return adjusted
