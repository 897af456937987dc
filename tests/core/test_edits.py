"""Which tokens are disturbed, and by what."""

import numpy as np
import pytest

pytest.importorskip("transformers")

from erpo_core.analysis.edits import Vocabulary, choose_positions, draw_replacement, eligible_tokens
from erpo_core.analysis.tokens import display_tokens
from erpo_core.specs.perturbation import PerturbationSpec
from tiny_model import make_tiny_tokenizer

BAND = (2.0, 4.0)


def spec(**changes) -> PerturbationSpec:
    return PerturbationSpec.model_validate({"model": "m", "dataset": "d", **changes})


def eligible_text(text: str) -> str:
    """The letters of a text that may be disturbed; byte-level tokens."""
    tokenizer = make_tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = display_tokens(tokenizer, ids)
    countable = np.array([token not in tokenizer.all_special_ids for token in ids])
    return "".join(t for t, ok in zip(texts, eligible_tokens(texts, countable), strict=True) if ok)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("so \\boxed{1} no \\boxed{42}. ok", "so \\boxed{1} no "),
        ("so \\boxed{\\frac{1}{2}}", "so "),
        ("no box at all", "no box at all"),
        ("an open \\boxed{4", "an open \\boxed{4"),
        ("a永b<|im_end|>", "ab"),
        ("\\boxed{1}", ""),
    ],
)
def test_only_what_stands_before_the_answer_is_disturbed(text, left):
    assert eligible_text(text) == left


def test_high_and_low_are_the_extremes_and_every_arm_has_as_many():
    entropies = np.random.default_rng(0).permutation(100) / 10
    eligible = np.arange(100) < 80
    chosen = choose_positions(entropies, eligible, spec(num_positions=4), (0, 1))
    order = np.argsort(np.where(eligible, entropies, np.nan))[:80]
    assert set(chosen["low"]) == set(order[:4])
    assert set(chosen["high"]) == set(order[-4:])
    assert {len(set(found)) for found in chosen.values()} == {4}
    assert all(eligible[found].all() for found in chosen.values())
    assert chosen["same"] == chosen["high"]
    assert chosen == choose_positions(entropies, eligible, spec(num_positions=4), (0, 1))


def test_matched_positions_lie_in_the_same_tenth_and_are_no_high_ones():
    rng = np.random.default_rng(0)
    for seed in range(50):
        chosen = choose_positions(rng.random(200), np.ones(200, bool), spec(num_positions=10), (seed,))
        tenths = {arm: sorted(p * 10 // 200 for p in chosen[arm]) for arm in ("high", "random_matched")}
        assert tenths["high"] == tenths["random_matched"]
        assert not set(chosen["high"]) & set(chosen["random_matched"])


def test_ties_among_the_lowest_are_broken_by_chance():
    entropies = np.where(np.arange(50) < 2, 3.0, 0.0)
    found = {tuple(choose_positions(entropies, np.ones(50, bool), spec(), (s,))["low"]) for s in range(30)}
    assert len(found) > 10


def test_an_answer_where_high_and_low_would_meet_is_not_disturbed():
    chosen = choose_positions(np.array([1.0]), np.ones(1, bool), spec(), (0,))
    assert not any(chosen.values())


def test_every_token_of_an_arm_is_replaced_in_edit_all():
    chosen = choose_positions(np.random.default_rng(0).random(100), np.ones(100, bool), spec(mode="edit_all"), (0,))
    assert {len(found) for found in chosen.values()} == {5}


def test_special_tokens_the_same_text_and_parts_of_characters_never_replace():
    tokenizer = make_tiny_tokenizer()
    written = tokenizer("x", add_special_tokens=False)["input_ids"][0]
    allowed = Vocabulary(tokenizer).allowed(written, len(tokenizer) + 10)
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    for token in np.flatnonzero(allowed):
        assert token < len(tokenizer)
        assert texts[token] != "x"
        assert "\ufffd" not in texts[token]
        assert token not in tokenizer.all_special_ids
    assert allowed.sum() == 127  # the bytes of ASCII without x


@pytest.fixture
def scene():
    """(log-probabilities, allowed) of 50 tokens; token 7 is the best and not allowed."""
    logits = np.random.default_rng(0).normal(size=50) * 2
    logits[7] = 10
    allowed = np.ones(50, bool)
    allowed[[7, 8]] = False
    return logits - np.log(np.exp(logits).sum()), allowed


def drawn(policy, scene, count=400):
    rng = np.random.default_rng(1)
    return np.array([draw_replacement(policy, *scene, rng, BAND) for _ in range(count)])


def test_the_second_best_is_the_likeliest_that_may_stand(scene):
    logps, allowed = scene
    assert set(drawn("second_best", scene)) == {int(np.where(allowed, logps, -np.inf).argmax())}


def test_any_token_is_any_that_is_allowed(scene):
    found = drawn("uniform_vocab", scene, 2000)
    assert set(found) == set(np.flatnonzero(scene[1]))


def test_alternatives_come_as_often_as_the_model_says(scene):
    logps, allowed = scene
    share = np.bincount(drawn("on_policy_alt", scene, 20_000), minlength=50) / 20_000
    expected = np.where(allowed, np.exp(logps), 0)
    np.testing.assert_allclose(share, expected / expected.sum(), atol=0.012)


def test_like_surprisal_lies_in_the_band_or_next_to_it(scene):
    logps, allowed = scene
    shifted = (logps + (-3.0 - logps[allowed].max()), allowed)
    surprisal = -shifted[0][drawn("surprisal_matched", shifted)]
    assert surprisal.min() >= 2
    assert surprisal.max() <= 4
    far = -(logps - 50)[drawn("surprisal_matched", (logps - 50, allowed), 3)]
    assert (far == -(logps - 50)[allowed].max()).all()
