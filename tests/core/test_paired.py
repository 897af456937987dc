"""Paired comparisons equal what counting every possibility gives."""

from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from erpo_core.analysis.statistics import wilson_interval
from erpo_core.paired import (
    holm,
    mcnemar_exact,
    minimum_detectable,
    paired_difference,
    sign_flip_exact,
    sign_flip_test,
)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_the_sign_flip_test_equals_enumeration(differences):
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
            for signs in product((-1, 1), repeat=len(differences))]  # fmt: skip
    expected = sum(total >= abs(sum(differences)) for total in sums) / len(sums)
    assert sign_flip_exact(differences) == pytest.approx(expected)


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 5))
def test_mcnemar_is_the_sign_flip_test_of_single_samples(only_first, only_second, both):
    differences = [-1] * only_first + [1] * only_second + [0] * both
    assert mcnemar_exact(only_first, only_second) == pytest.approx(sign_flip_exact(differences))


@pytest.mark.parametrize(
    ("only_first", "only_second", "expected"),
    [(0, 0, 1.0), (0, 1, 1.0), (0, 6, 2 / 64), (3, 3, 1.0), (1, 9, 2 * (1 + 10) / 2**10), (5, 5, 1.0)],
)
def test_mcnemar_of_small_tables(only_first, only_second, expected):
    assert mcnemar_exact(only_first, only_second) == pytest.approx(expected)
    assert mcnemar_exact(only_second, only_first) == pytest.approx(expected)


def test_mcnemar_of_many_problems_does_not_overflow():
    tail = sum(comb(3000, i) for i in range(1401))
    assert mcnemar_exact(1400, 1600) == pytest.approx(2 * tail / 2**3000)


def test_the_exact_test_of_a_real_size_is_close_to_the_normal_one():
    rng = np.random.default_rng(0)
    differences = rng.integers(-16, 17, size=500)
    z = abs(differences.sum()) / np.sqrt((differences**2).sum())
    normal = 2 * (1 - 0.5 * (1 + np.vectorize(__import__("math").erf)(z / np.sqrt(2))))
    assert sign_flip_exact(differences) == pytest.approx(float(normal), abs=2e-3)


def test_holm_of_a_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_keeps_the_order_and_lies_between_raw_and_bonferroni(p_values):
    adjusted = holm(p_values)
    for raw, found in zip(p_values, adjusted, strict=True):
        assert raw <= found <= min(1.0, raw * len(p_values)) or found == pytest.approx(raw)
    by_raw = [found for _, found in sorted(zip(p_values, adjusted, strict=True))]
    assert by_raw == sorted(by_raw)


def test_pairing_narrows_the_interval_where_problems_are_alike():
    rng = np.random.default_rng(1)
    hard = rng.random(100)
    first, second = hard, np.clip(hard + 0.05 + rng.normal(0, 0.02, 100), 0, 1)
    found = paired_difference(first, second, seed=3)
    assert found["value"] == pytest.approx(np.mean(second - first))
    assert 0.03 < found["low"] < found["value"] < found["high"] < 0.07
    assert found == paired_difference(first, second, seed=3)
    swapped = paired_difference(second, first, seed=3)
    assert (swapped["low"], swapped["high"]) == pytest.approx((-found["high"], -found["low"]))
    with pytest.raises(ValueError, match="1 and 2 problems"):
        paired_difference([1.0], [1.0, 0.0])


def test_sign_flips_of_few_problems_are_all_counted():
    differences = [0.5, 0.25, -0.25, 1.0, 0.0, 0.75]
    sums = [abs(np.dot(signs, differences)) for signs in product((1, -1), repeat=len(differences))]
    expected = np.mean([s >= sum(differences) - 1e-12 for s in sums])
    assert sign_flip_test(differences) == pytest.approx(expected)


def test_many_problems_are_flipped_at_random_by_the_seed_and_never_give_zero():
    differences = np.full(40, 0.5)
    assert sign_flip_test(differences, resamples=500) == 1 / 501
    draws = np.random.default_rng(0).normal(0.2, 1, 40)
    assert sign_flip_test(draws, seed=3) == sign_flip_test(draws, seed=3)
    assert abs(sign_flip_test(draws, seed=3) - sign_flip_test(draws, seed=4)) < 0.03


def test_under_the_null_hypothesis_few_p_values_are_small():
    rng = np.random.default_rng(1)
    found = [sign_flip_test(rng.choice([-0.5, 0, 0.5], 30), resamples=400, seed=i) <= 0.05 for i in range(300)]
    assert np.mean(found) < 0.09


def test_fewer_than_six_problems_can_show_nothing_and_more_show_less():
    assert minimum_detectable([0.5] * 5) is None
    six, hundred = minimum_detectable([0.5, -0.5] * 3), minimum_detectable([0.5, -0.5] * 50)
    assert 0 < hundred < six <= 1
    assert minimum_detectable([0.0] * 100) == pytest.approx(2.8016 / 100, rel=1e-3)


def test_the_wilson_interval_has_its_published_values_and_stays_in_bounds():
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(20, 20)[1] == 1.0
    with pytest.raises(ValueError, match="3 of 2"):
        wilson_interval(3, 2)
