"""Boxed answers and their checking, hostile ones included."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erpo_core.rewards.answers import extract_boxed
from erpo_core.rewards.functions import reward_functions
from erpo_core.rewards.verify import Verdict, Verifier
from erpo_core.specs.common import RewardSpec


@pytest.fixture(scope="module")
def verifier():
    with Verifier(deadline_seconds=2) as found:
        yield found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{5} no, \boxed{8}", "8"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{7", None),
        (r"\boxed{3} and \boxed{", "3"),
        (r"\boxed{ }", None),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("The answer is 42.", None),
        ("", None),
    ],
)
def test_the_last_balanced_box_is_the_answer(text, expected):
    assert extract_boxed(text) == expected


@given(st.text(alphabet="\\boxed{}1 \0", max_size=200))
def test_extraction_takes_any_text(text):
    found = extract_boxed(text)
    assert found is None or (found.strip() == found and found in text)


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("7", "7", "right"),
        ("7", "7.0", "right"),
        ("7", "8", "wrong"),
        ("1234", "1,234", "right"),
        ("58204", r"58\,204", "right"),
        ("64", "64.", "right"),
        (r"\frac{1}{2}", "0.5", "right"),
        ("2x+1", "1+2x", "right"),
        (r"\sqrt{2}", r"\sqrt{8}/2", "right"),
        (r"7.4 \times 10^{-12}", "0.0", "wrong"),
        (r"1.3 \times 10^{-27}", r"5 \times 10^{-20}", "wrong"),
        ("9", r"9\%", "right"),
        ("5", "nonsense!!", "unparsable"),
    ],
)
def test_equal_answers_are_right_however_written(verifier, gold, answer, expected):
    assert verifier.check(gold, f"\\boxed{{{answer}}}") in (expected, "wrong" if expected == "unparsable" else expected)


@pytest.mark.parametrize(
    "hostile",
    [
        r"9^{9^{9^9}}",
        r"\dfrac{5^{(5^{(5^{(5^5)})}-4)}-5}{16}",
        r"10^9!",
        r"\binom{1000000000}{500000000}",
        "{" * 400 + "}" * 400,
        "1\0",
    ],
)
def test_a_hostile_answer_is_never_right_and_never_stalls(verifier, hostile):
    started = time.monotonic()
    assert verifier.check_answer("3", hostile) is not Verdict.RIGHT
    assert time.monotonic() - started < 15
    assert verifier.check("3", r"\boxed{3}") is Verdict.RIGHT


def test_the_process_is_gone_after_close():
    verifier = Verifier()
    verifier.check("1", r"\boxed{x+1}")
    process = verifier._process
    verifier.close()
    assert process.poll() is not None


def test_rewards_follow_their_specs(verifier):
    specs = (
        RewardSpec(name="accuracy"),
        RewardSpec(name="boxed_format"),
        RewardSpec(name="length_penalty", args={"max_tokens": 4}),
        RewardSpec(name="regex", args={"pattern": "^So"}),
    )
    functions = reward_functions(specs, verifier)
    completions = [r"So \boxed{4}", [{"role": "assistant", "content": "five"}]]
    columns = {"completions": completions, "answer": ["4", "5"], "completion_ids": [[1, 2], [1, 2, 3, 4, 5]]}
    assert [function.__name__ for function in functions] == [spec.name for spec in specs]
    assert [function(**columns) for function in functions] == [[1, 0], [1, 0], [-0.5, -1], [1, 0]]
    assert functions[0].last_verdicts == [Verdict.RIGHT, Verdict.UNPARSABLE]
