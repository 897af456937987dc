"""pass@k, maj@k and intervals over problems. Light: also the API recomputes them from stored answers."""

import math
from collections.abc import Hashable, Sequence
from functools import lru_cache
from itertools import combinations

import numpy as np

_ENUMERATED = 2000


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold one of the c right ones. Unbiased.

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k: n={n}, c={c}, k={k}; wanted 0 <= c <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(votes: Sequence[Hashable | None], right: Sequence[bool], k: int, *, seed: int = 0) -> float:
    """Probability that the most frequent answer among k of the n samples is right; answers in a tie share it.

    Args:
        votes: the answer of each sample, None where there is none: it has no vote.
        right: whether each is right; equal votes are equally right.

    Every choice of k is counted, or 2,000 random ones where there are more.

    Raises:
        ValueError: lengths differ, or not 1 <= k <= n.
    """
    n = len(votes)
    if len(right) != n or not 1 <= k <= n:
        raise ValueError(f"maj_at_k: {n} votes, {len(right)} verdicts, k={k}")
    codes = {vote: code for code, vote in enumerate(dict.fromkeys(vote for vote in votes if vote is not None))}
    if not codes:
        return 0.0
    none = len(codes)
    cast = np.array([codes.get(vote, none) for vote in votes])
    is_right = np.zeros(none, dtype=bool)
    for vote, good in zip(cast, right, strict=True):
        if vote < none:
            is_right[vote] = good
    chosen = _choices(n, k, seed)
    places = cast[chosen] + np.arange(len(chosen))[:, None] * (none + 1)
    counts = np.bincount(places.ravel(), minlength=len(chosen) * (none + 1)).reshape(len(chosen), none + 1)[:, :none]
    most = counts.max(axis=1, keepdims=True)
    wins = (counts == most) & (most > 0)
    return float(np.mean((wins & is_right).sum(axis=1) / np.maximum(wins.sum(axis=1), 1)))


@lru_cache(maxsize=32)
def _choices(n: int, k: int, seed: int) -> np.ndarray:
    """(C, k) places: every choice of k of n, or random ones."""
    if math.comb(n, k) <= _ENUMERATED:
        return np.array(list(combinations(range(n), k)))
    order = np.random.default_rng(seed).random((_ENUMERATED, n)).argsort(axis=1)
    return order[:, :k]


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean, problems (P,) drawn with replacement. The same seed gives the same interval.

    Raises:
        ValueError: no value.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError("bootstrap_interval: one value for each problem, and at least one problem")
    draw = np.random.default_rng(seed)
    # In blocks: (resamples, P) at once would be large for a few thousand problems.
    means = [array[draw.integers(len(array), size=(50, len(array)))].mean(axis=1) for _ in range(-(-resamples // 50))]
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
