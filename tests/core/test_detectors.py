"""Pivots, statistics and the trace codec."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from erpo_core.analysis.detectors import find_pivots
from erpo_core.analysis.statistics import sequence_stats
from erpo_core.specs.entropy import DetectorSpec


@given(st.lists(st.floats(0, 8), min_size=1, max_size=200), st.floats(0.01, 1))
def test_the_quantile_detector_marks_exactly_its_share_of_the_highest(values, fraction):
    values = np.array(values)
    (pivots,) = find_pivots([values], DetectorSpec(fraction=fraction))
    assert len(pivots) == math.ceil(fraction * len(values) - 1e-9)
    rest = np.delete(values, pivots)
    assert not len(rest) or values[pivots].min() >= rest.max()
    assert (np.diff(pivots) > 0).all()


def test_ties_are_broken_by_seed_and_not_by_position():
    values = np.zeros(1000)
    first, again = (find_pivots([values], DetectorSpec(), seed=1)[0] for _ in range(2))
    other = find_pivots([values], DetectorSpec(), seed=2)[0]
    assert first.tolist() == again.tolist() != other.tolist()
    assert first.max() > 100


def test_scopes_share_their_statistics():
    low, high = np.full(100, 0.1), np.full(100, 5.0)
    per_run = find_pivots([low, high], DetectorSpec(scope="run", fraction=0.1))
    assert [len(p) for p in per_run] == [0, 20]
    grouped = find_pivots([low, high, low], DetectorSpec(scope="group", fraction=0.1), groups=[0, 0, 1])
    assert [len(p) for p in grouped] == [0, 20, 10]


def test_tokens_that_may_not_be_pivots_never_are():
    values = np.array([1.0, np.nan, 3.0, 2.0])
    for kind in ("quantile", "absolute", "zscore", "gate", "transient"):
        (pivots,) = find_pivots([values], DetectorSpec(kind=kind, fraction=1, threshold=-1.0))
        assert 1 not in pivots


@pytest.mark.parametrize(
    ("detector", "expected"),
    [
        (DetectorSpec(kind="absolute", threshold=1.5), [2, 5]),
        (DetectorSpec(kind="transient", threshold=1.0), [2, 5]),
        (DetectorSpec(kind="zscore", threshold=1.5), [2]),
        (DetectorSpec(kind="absolute", threshold=0.0, min_entropy=2.0), [2]),
    ],
)
def test_each_detector_finds_what_it_names(detector, expected):
    values = np.array([0.0, 0.1, 2.5, 0.2, 0.4, 1.8, 0.0, 0.3])
    assert find_pivots([values], detector)[0].tolist() == expected


def test_statistics_count_every_token_once():
    values = np.array([0.0, 1e-5, 0.5, 3.0, 40.0])
    stats, histogram = sequence_stats(values)
    assert sum(histogram) == 5
    assert (histogram[0], histogram[-1]) == (2, 1)
    assert stats["h_max"] == 40.0
    assert sequence_stats(np.array([]))[0]["h_mean"] is None
