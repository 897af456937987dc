"""Two conditions on the same problems: what differs, how surely, and what could have been seen. Numpy alone.

The unit is the problem. Several outcomes of one problem are not independent: they become its mean before anything here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from erpo_core.passk import bootstrap_interval

_ENUMERATED_BITS = 13
"""Sign patterns of up to 13 problems are all counted."""


@dataclass(frozen=True)
class McNemar:
    """2 x 2 counts of problems and the exact two-sided p-value of equal marginals."""

    both: int
    only_first: int
    only_second: int
    neither: int
    p_value: float


def mcnemar_exact(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """One outcome per problem and condition: the binomial test of the discordant pairs against 1/2.

    Raises:
        ValueError: lengths differ.
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape:
        raise ValueError(f"mcnemar_exact: {a.size} and {b.size} outcomes")
    left, right = int((a & ~b).sum()), int((~a & b).sum())
    tail = sum(math.comb(left + right, i) for i in range(min(left, right) + 1)) / 2 ** (left + right)
    return McNemar(int((a & b).sum()), left, right, int((~a & ~b).sum()), min(1.0, 2 * tail))


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


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for their number (Holm 1979), under the same names."""
    adjusted, running = {}, 0.0
    for index, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - index) * p_values[name]))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of mean(first - second), whole problems drawn with replacement.

    Raises:
        ValueError: lengths differ, or no problem.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired_bootstrap: {a.size} and {b.size} problems")
    return bootstrap_interval(a - b, confidence=confidence, resamples=resamples, seed=seed)


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
