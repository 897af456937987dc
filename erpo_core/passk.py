"""pass@k, maj@k and intervals over problems."""

from collections import Counter
from collections.abc import Sequence
from math import comb

import numpy as np

_RESAMPLES = 2000


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from c right ones among n (2107.03374, eq. 1).

    Raises:
        ValueError: k is larger than n, or c lies outside 0..n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k: {k} must lie between 1 and the number of samples ({n})")
    if not 0 <= c <= n:
        raise ValueError(f"c: {c} must lie between 0 and the number of samples ({n})")
    return 1.0 - comb(n - c, k) / comb(n, k)


def majority(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, the first among equals; None if there is no answer."""
    counts = Counter(answer for answer in answers if answer is not None)
    return counts.most_common(1)[0][0] if counts else None


def interval(values: Sequence[float], *, seed: int = 0, level: float = 0.95) -> dict[str, float | None]:
    """Mean of one value per problem, with the percentile bootstrap over problems: ``{value, low, high}``.

    Samples of one problem are not independent, so problems are resampled, never samples.
    """
    data = np.asarray(values, dtype=float)
    if not len(data):
        return {"value": None, "low": None, "high": None}
    generator = np.random.default_rng(seed)
    means = data[generator.integers(0, len(data), (_RESAMPLES, len(data)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return {"value": float(data.mean()), "low": float(low), "high": float(high)}
