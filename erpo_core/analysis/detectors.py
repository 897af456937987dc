"""Critical Decision Pivots from stored entropies. Numpy alone: the API recomputes them without a model."""

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from erpo_core.specs.entropy import DetectorSpec

DETECTOR_VERSION = 1
_DEFAULT_THRESHOLD = {"absolute": 0.672, "zscore": 2.0, "gate": 0.88, "transient": 0.3}
"""0.672 nats is the 80th percentile reported in 2506.01939; a gate of 0.88 is a z-score of 2 at gamma = 1."""


def find_pivots(
    entropies: Sequence[np.ndarray], detector: DetectorSpec, groups: Sequence[int] | None = None, seed: int = 0
) -> list[np.ndarray]:
    """Positions of the pivots of each sequence, ascending.

    Args:
        entropies: One float array per sequence, nats; positions that may not be pivots are NaN.
        detector: What counts as a pivot, and over which scope its statistics run.
        groups: Prompt group of each sequence, for ``scope="group"``.
        seed: Of the order among equal entropies: the bottom of a distribution is nearly all ties.
    """
    marked = [np.zeros(len(values), dtype=bool) for values in entropies]
    for members in _scopes(len(entropies), detector.scope, groups):
        joined = np.concatenate([np.asarray(entropies[i], dtype=np.float64) for i in members])
        offsets = np.cumsum([0, *(len(entropies[i]) for i in members)])
        chosen = _mark(joined, offsets, detector, seed + members[0])
        for index, start, end in zip(members, offsets[:-1], offsets[1:], strict=True):
            marked[index] = chosen[start:end]
    return [np.flatnonzero(mask) for mask in marked]


def _scopes(count: int, scope: str, groups: Sequence[int] | None) -> list[list[int]]:
    if scope == "sequence":
        return [[index] for index in range(count)]
    if scope == "run" or groups is None:
        return [list(range(count))] if count else []
    by_group = defaultdict(list)
    for index, group in enumerate(groups):
        by_group[group].append(index)
    return list(by_group.values())


def _mark(values: np.ndarray, offsets: np.ndarray, detector: DetectorSpec, seed: int) -> np.ndarray:
    allowed = np.isfinite(values) & (values >= detector.min_entropy)
    if not np.isfinite(values).any():
        return allowed
    if detector.kind == "quantile":
        return _top_fraction(values, allowed, detector.fraction, seed)
    threshold = _DEFAULT_THRESHOLD[detector.kind] if detector.threshold is None else detector.threshold
    if detector.kind == "absolute":
        return allowed & (values >= threshold)
    if detector.kind == "transient":
        peaks = [_peaks(values[a:b], threshold) for a, b in pairwise(offsets)]
        return allowed & np.concatenate(peaks)
    z = (values - np.nanmean(values)) / (np.nanstd(values) + 1e-6)
    score = z if detector.kind == "zscore" else 1 / (1 + np.exp(-z))
    return allowed & (score >= threshold)


def _top_fraction(values: np.ndarray, allowed: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Exactly ceil(fraction n) of the n finite tokens, fewer only where ``min_entropy`` leaves fewer."""
    count = math.ceil(fraction * np.isfinite(values).sum() - 1e-9)
    ties = np.random.default_rng(seed).random(len(values))
    order = np.lexsort((ties, np.where(allowed, -values, np.inf)))
    chosen = np.zeros(len(values), dtype=bool)
    chosen[order[:count]] = True
    return chosen & allowed


def _peaks(values: np.ndarray, prominence: float) -> np.ndarray:
    """Local maxima that stand out by ``prominence`` nats from the higher of the valleys on their two sides."""
    filled = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0)
    mask = np.zeros(len(filled), dtype=bool)
    for index, height in enumerate(filled):
        left, right = filled[:index], filled[index + 1 :]
        if (len(left) and left[-1] >= height) or (len(right) and right[0] > height):
            continue
        base = max(_valley(left[::-1], height), _valley(right, height))
        mask[index] = height - base >= prominence
    return mask


def _valley(side: np.ndarray, height: float) -> float:
    """The lowest point before a higher one; 0 (certainty) where the sequence ends first."""
    higher = np.flatnonzero(side > height)
    if not len(higher):
        return 0.0 if not len(side) else float(side.min())
    return float(side[: higher[0]].min())
