"""pass@k and maj@k equal what counting every choice of k gives."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erpo_core.passk import bootstrap_interval, maj_at_k, pass_at_k


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_equals_enumeration(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            choices = list(combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_k_of_many_samples_is_exact():
    assert pass_at_k(1024, 0, 512) == 0
    assert pass_at_k(1024, 1, 512) == pytest.approx(0.5)
    assert pass_at_k(1024, 1024, 1) == 1


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_impossible_counts_are_refused(n, c, k):
    with pytest.raises(ValueError, match="pass_at_k"):
        pass_at_k(n, c, k)


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=7), st.data())
def test_maj_at_k_equals_enumeration(votes, data):
    k = data.draw(st.integers(1, len(votes)))
    right = [vote == "a" for vote in votes]
    expected = []
    for chosen in combinations(votes, k):
        counts = {vote: chosen.count(vote) for vote in chosen if vote is not None}
        winners = [vote for vote, count in counts.items() if count == max(counts.values())]
        expected.append(("a" in winners) / len(winners) if winners else 0.0)
    assert maj_at_k(votes, right, k) == pytest.approx(sum(expected) / len(expected))


def test_maj_at_k_samples_where_choices_are_many():
    votes, right = ["a"] * 20 + ["b"] * 10, [True] * 20 + [False] * 10
    estimate = maj_at_k(votes, right, 9, seed=1)
    assert estimate == maj_at_k(votes, right, 9, seed=1)
    assert 0.8 < estimate < 1


def test_maj_at_one_is_the_share_of_right_answers():
    assert maj_at_k(["a", None, "b", "a"], [True, False, False, True], 1) == 0.5


def test_the_interval_holds_the_mean_narrows_with_problems_and_repeats():
    few, many = [0.0, 1.0] * 10, [0.0, 1.0] * 500
    low, high = bootstrap_interval(few, seed=3)
    assert (low, high) == bootstrap_interval(few, seed=3)
    assert low < 0.5 < high
    narrow = bootstrap_interval(many, seed=3)
    assert narrow[1] - narrow[0] < (high - low) / 3
    # One standard error of the mean of 1,000 fair coins is 0.0158.
    assert narrow[1] - narrow[0] == pytest.approx(2 * 1.96 * 0.0158, rel=0.15)
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)
    with pytest.raises(ValueError, match="problem"):
        bootstrap_interval([])
