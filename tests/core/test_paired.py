"""Paired comparisons against enumeration, published values and simulation."""

from itertools import product

import numpy as np
import pytest

from erpo_core.analysis.statistics import wilson_interval
from erpo_core.paired import holm, mcnemar_exact, minimum_detectable, paired_bootstrap, sign_flip_test


def test_mcnemar_counts_problems_and_is_the_binomial_test_of_the_discordant_ones():
    first = [True] * 20 + [True] * 11 + [False] * 5
    second = [True] * 20 + [False] * 11 + [False] * 5
    test = mcnemar_exact(first, second)
    assert (test.both, test.only_first, test.only_second, test.neither) == (20, 11, 0, 5)
    assert test.p_value == pytest.approx(2 / 2**11)
    assert mcnemar_exact(second, first).p_value == test.p_value


@pytest.mark.parametrize("pairs", [(0, 0), (1, 0), (3, 3)])
def test_mcnemar_without_an_imbalance_finds_nothing(pairs):
    left, right = pairs
    first = [True] * left + [False] * right
    assert mcnemar_exact(first, [not x for x in first]).p_value == 1.0


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


def test_holm_multiplies_step_by_step_and_never_falls():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_the_bootstrap_draws_whole_problems():
    first, second = np.array([1.0, 0.5, 0.75, 1.0]), np.array([0.5, 0.0, 0.25, 0.5])
    assert paired_bootstrap(first, second) == (0.5, 0.5)
    rng = np.random.default_rng(2)
    low, high = paired_bootstrap(rng.random(100), rng.random(100))
    assert low < 0 < high


def test_fewer_than_six_problems_can_show_nothing_and_more_show_less():
    assert minimum_detectable([0.5] * 5) is None
    six, hundred = minimum_detectable([0.5, -0.5] * 3), minimum_detectable([0.5, -0.5] * 50)
    assert 0 < hundred < six <= 1
    assert minimum_detectable([0.0] * 100) == pytest.approx(2.8016 / 100, rel=1e-3)


@pytest.mark.parametrize("function", [mcnemar_exact, paired_bootstrap])
def test_unequal_lengths_are_refused(function):
    with pytest.raises(ValueError, match="2 and 3"):
        function([1, 0], [1, 0, 1])


def test_the_wilson_interval_has_its_published_values_and_stays_in_bounds():
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(20, 20)[1] == 1.0
    with pytest.raises(ValueError, match="3 of 2"):
        wilson_interval(3, 2)
