"""Rewards have TRL's signature, take texts and chats alike, and refuse arguments they do not know."""

import time

import pytest

pytest.importorskip("math_verify")

from erpo_core.errors import SpecError
from erpo_core.rewards.functions import MAX_PATTERN_CHARS, check_rewards, known_rewards, reward_functions
from erpo_core.rewards.verify import Verdict, Verifier
from erpo_core.specs.common import RewardSpec

TEXTS = [r"so \boxed{7}", "7", r"\boxed{8}", r"\boxed{}"]


@pytest.fixture(scope="module")
def verifier():
    with Verifier(deadline=20) as running:
        yield running


def one(verifier, name, **args):
    return reward_functions([RewardSpec(name=name, args=args)], verifier)[0]


@pytest.mark.parametrize("wrap", [str, lambda text: [{"role": "assistant", "content": text}]])
def test_accuracy_credits_right_boxes_only_and_keeps_its_verdicts(verifier, wrap):
    accuracy = one(verifier, "accuracy")
    completions = [wrap(text) for text in TEXTS]
    scores = accuracy(prompts=["q"] * 4, completions=completions, completion_ids=[[1]] * 4, answer=["7"] * 4)
    assert scores == [1.0, 0.0, 0.0, 0.0]
    assert accuracy.last_verdicts == [Verdict.RIGHT, Verdict.UNPARSABLE, Verdict.WRONG, Verdict.UNPARSABLE]
    assert accuracy.__name__ == "accuracy"


def test_an_answer_that_hangs_the_check_scores_0_and_the_others_are_scored():
    tower = r"\boxed{\dfrac{5^{(5^{(5^{(5^5)})}-4)}-5}{16}}"
    with Verifier(deadline=2) as verifier:
        verifier.check("2x", r"\boxed{x+x}")  # started: the deadline is that of the checking
        accuracy = one(verifier, "accuracy")
        assert accuracy(completions=[tower, r"\boxed{9^{9^{9^9}}}", r"\boxed{7}"], answer=["7"] * 3) == [0.0, 0.0, 1.0]
    assert accuracy.last_verdicts[0] is Verdict.TIMEOUT
    assert Verdict.RIGHT not in accuracy.last_verdicts[:2]


def test_boxed_format_wants_a_box_with_something_in_it(verifier):
    assert one(verifier, "boxed_format")(completions=TEXTS) == [1.0, 0.0, 1.0, 0.0]


def test_length_penalty_falls_over_the_last_tokens(verifier):
    penalty = one(verifier, "length_penalty", max_completion_len=10, soft_punish_cache=4)
    ids = [[0] * n for n in (0, 6, 7, 10, 12)]
    assert penalty(completions=[""] * 5, completion_ids=ids) == [0, 0, -0.25, -1, -1]


def test_regex_searches_and_a_pattern_that_backtracks_for_ever_ends():
    with Verifier(deadline=1.5) as verifier:
        regex = one(verifier, "regex", pattern=r"boxed\{.+\}.*$")
        assert regex(completions=[*TEXTS, "\\boxed{1}\nbye"]) == [1.0, 0.0, 1.0, 0.0, 1.0]
        assert one(verifier, "regex", pattern="(a+)+$")(completions=["a" * 60 + "b"]) == [0.0]


def test_a_name_that_comes_twice_gets_a_number(verifier):
    specs = [RewardSpec(name="regex", args={"pattern": p}) for p in ("a", "b")]
    assert [f.__name__ for f in reward_functions(specs, verifier)] == ["regex", "regex_2"]


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("accuracy", {"tolerance": 1}),
        ("regex", {}),
        ("regex", {"pattern": "("}),
        ("regex", {"pattern": 3}),
        ("length_penalty", {"max_completion_len": 10}),
        ("length_penalty", {"max_completion_len": 10, "soft_punish_cache": 0}),
        ("length_penalty", {"max_completion_len": 2.5, "soft_punish_cache": 1}),
        ("length_penalty", {"max_completion_len": 10**400, "soft_punish_cache": 1}),
    ],
)
def test_wrong_arguments_are_refused_with_their_place(name, args):
    with pytest.raises(SpecError) as caught:
        check_rewards([RewardSpec(name="boxed_format"), RewardSpec(name=name, args=args)])
    assert caught.value.pointer == "/rewards/1/args"
    assert caught.value.mend


def test_patterns_are_bounded_before_any_is_compiled():
    fits, wide = "a" * MAX_PATTERN_CHARS, "(?i)" + "[\u0100-\U0010ffff]" * 3000
    check_rewards([RewardSpec(name="regex", args={"pattern": fits})])
    for index, patterns in enumerate([[wide], [fits, "b"]]):
        started = time.monotonic()
        with pytest.raises(SpecError, match="characters") as caught:
            check_rewards([RewardSpec(name="regex", args={"pattern": pattern}) for pattern in patterns])
        assert time.monotonic() - started < 1
        assert caught.value.pointer == f"/rewards/{index}/args"
        assert "1000" in caught.value.mend
    [listed] = [reward for reward in known_rewards() if reward["name"] == "regex"]
    assert f"{MAX_PATTERN_CHARS:,} characters" in listed["description"]
