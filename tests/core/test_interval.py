"""The interval that top-k log-probabilities leave for an entropy: it holds them all, and both ends are attained."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from erpo_core.analysis.interval import entropy_interval

ROUNDING = 1e-9


def entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


@st.composite
def distributions(draw) -> tuple[np.ndarray, int]:
    """(probabilities, descending; k): from nearly certain to nearly uniform."""
    size = draw(st.integers(2, 400))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    p = rng.dirichlet(np.full(size, 10.0 ** draw(st.floats(-2, 1.5))))
    return np.sort(p)[::-1] / p.sum(), draw(st.integers(1, min(size, 30)))


def logs(p: np.ndarray) -> np.ndarray:
    """As engines give them: -9999 in place of minus infinity."""
    return np.log(np.maximum(p, 1e-300)).clip(-9999)


@given(distributions())
def test_the_entropy_lies_in_the_interval(case):
    p, k = case
    low, high = entropy_interval(logs(p[:k]), len(p))
    assert low - ROUNDING <= entropy(p) <= high + ROUNDING


@given(distributions(), st.data())
def test_a_known_token_beyond_the_list_narrows_the_interval(case, data):
    p, k = case
    if k == len(p):
        return
    index = data.draw(st.integers(k, len(p) - 1))
    low, high = entropy_interval(logs(p[:k]), len(p))
    known_low, known_high = entropy_interval(logs(p[[*range(k), index]]), len(p), ceiling=logs(p)[k - 1])
    assert known_low - ROUNDING <= entropy(p) <= known_high + ROUNDING
    assert low - ROUNDING <= known_low <= known_high <= high + ROUNDING


@given(distributions())
def test_both_ends_are_entropies_of_distributions_with_the_same_likeliest_tokens(case):
    p, k = case
    low, high = entropy_interval(logs(p[:k]), len(p))
    rest, least, others = p[k:].sum(), p[k - 1], len(p) - k
    steep = np.zeros(others)
    full = int(rest / least) if least > 0 else 0
    steep[:full] = least
    if full < others:
        steep[full] = rest - full * least
    flat = np.full(others, rest / others) if others else np.zeros(0)
    for tail, end in ((steep, low), (flat, high)):
        assert tail.max(initial=0) <= least + ROUNDING
        assert entropy(np.concatenate([p[:k], tail])) == pytest.approx(end, abs=1e-7)


@given(distributions())
def test_the_whole_vocabulary_leaves_no_doubt(case):
    p, _ = case
    low, high = entropy_interval(logs(p), len(p))
    assert low == pytest.approx(entropy(p), abs=1e-7)
    assert high == pytest.approx(low, abs=1e-7)


def test_more_tokens_narrow_it():
    p = np.sort(np.random.default_rng(3).dirichlet(np.full(5000, 0.05)))[::-1]
    widths = [np.subtract(*entropy_interval(logs(p[:k]), 5000)[::-1]) for k in (1, 5, 20, 100)]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.5 * widths[0]


@pytest.mark.parametrize(
    ("logps", "size", "words"),
    [
        ([np.log(0.7), np.log(0.6)], 100, "add up to 1.3"),
        ([np.log(0.5), np.log(0.001)], 100, "not the likeliest"),
        ([np.log(0.5)] * 2, 1, "vocabulary of 1"),
        ([], 100, "0 tokens"),
    ],
)
def test_what_no_distribution_has_is_refused(logps, size, words):
    with pytest.raises(ValueError, match=words):
        entropy_interval(logps, size)
