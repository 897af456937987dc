"""Summaries: of one sequence's entropies, stored beside its trace, and of pivots. Intervals of shares."""

import math
from collections.abc import Iterable
from statistics import NormalDist
from typing import Any

import numpy as np

_TOP_TOKENS = 20

HISTOGRAM_EDGES = np.concatenate([[0.0], np.geomspace(1e-4, 12.0, 64)[:-1], [np.inf]])
"""Edges in nats of the 64 bins: the first holds [0, 1e-4), the last all beyond the others; log-spaced between."""


def sequence_stats(entropies: np.ndarray) -> tuple[dict[str, float | None], list[int]]:
    """``{h_mean, h_p50, h_p95, h_max}`` in nats, and counts in the bins of ``HISTOGRAM_EDGES``."""
    counts = np.histogram(entropies, HISTOGRAM_EDGES)[0].tolist()
    if not len(entropies):
        return {"h_mean": None, "h_p50": None, "h_p95": None, "h_max": None}, counts
    values = np.asarray(entropies, dtype=np.float64)
    median, high = np.quantile(values, [0.5, 0.95])
    stats = {"h_mean": values.mean(), "h_p50": median, "h_p95": high, "h_max": values.max()}
    return {name: float(value) for name, value in stats.items()}, counts


def top_pivot_tokens(pivots: Iterable[dict[str, Any]], highest: str = "max_entropy") -> list[dict[str, Any]]:
    """The tokens that most pivots are, with their count and, under the name ``highest``, their highest entropy."""
    by_token: dict[str, list[float]] = {}
    for pivot in pivots:
        by_token.setdefault(pivot["token"], []).append(pivot["entropy"])
    ranked = sorted(by_token.items(), key=lambda item: (-len(item[1]), -max(item[1])))[:_TOP_TOKENS]
    return [{"token": token, "count": len(found), highest: max(found)} for token, found in ranked]


def wilson_interval(successes: int, trials: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a probability from independent trials (Wilson 1927): sensible at 0 and 1 and for few trials.

    Raises:
        ValueError: unless 0 <= successes <= trials and trials >= 1.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"wilson_interval: {successes} of {trials}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = successes / trials, z * z / trials
    centre = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    return max(0.0, low) if successes else 0.0, min(1.0, high) if successes < trials else 1.0
