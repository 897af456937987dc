"""pass@k, maj@k and intervals over problems. Light: also the API recomputes them from stored answers."""

import math
import random
from collections import Counter
from collections.abc import Hashable, Sequence
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
    if math.comb(n, k) <= _ENUMERATED:
        chosen = list(combinations(range(n), k))
    else:
        draw = random.Random(seed)
        chosen = [draw.sample(range(n), k) for _ in range(_ENUMERATED)]
    return math.fsum(_majority([(votes[i], right[i]) for i in one if votes[i] is not None]) for one in chosen) / len(
        chosen
    )


def _majority(cast: list[tuple[Hashable, bool]]) -> float:
    counts = Counter(vote for vote, _ in cast)
    if not counts:
        return 0.0
    most = max(counts.values())
    winners = {vote for vote, count in counts.items() if count == most}
    return len({vote for vote, right in cast if right and vote in winners}) / len(winners)


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
