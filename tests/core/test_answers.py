"""Boxes are found by their braces, in linear time; plain numbers need no mathematics."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erpo_core.rewards.answers import extract_boxed, has_answer, normalise, plain_number, same_number


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no box, 42", None),
        (r"so \boxed{7}.", "7"),
        (r"\boxed{5} and then \boxed{8}", "8"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{x = \boxed{5} }", "5"),
        (r"\boxed{4} then cut at \boxed{\frac{1", "4"),
        (r"\boxed{\left\{1, 2\right.}", r"\left\{1, 2\right."),
        (r"} stray {\boxed {6}", "6"),
        (r"\boxed{ }", None),
        (r"\boxed{5} or \boxed{}", None),
        (r"\boxed 5", None),
        (r"\boxed{\}", None),
        ("", None),
    ],
)
def test_the_last_balanced_box_is_the_answer(text, expected):
    assert extract_boxed(text) == expected
    assert has_answer(text) == (expected is not None)


@pytest.mark.parametrize("text", ["\\boxed{" * 200_000, "\\boxed{1}" * 200_000, "{" * 1_000_000, "\\" * 1_000_001])
def test_hostile_responses_take_linear_time(text):
    started = time.process_time()
    extract_boxed(text)
    assert time.process_time() - started < 5


@given(st.text(alphabet="\\boxed{}1 x", max_size=60))
def test_a_found_box_stands_in_the_text_and_is_balanced(text):
    found = extract_boxed(text)
    if found is not None:
        assert found in text
        bare = found.replace("\\\\", "").replace("\\{", "").replace("\\}", "")
        assert bare.count("{") == bare.count("}")


@given(st.text(alphabet="ab+1{}", max_size=20).filter(lambda t: t.count("{") == t.count("}") == 0))
def test_what_is_boxed_is_found(content):
    assert extract_boxed(f"first \\boxed{{0}} then \\boxed{{{content}}} end") == (content.strip() or None)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" $5$ ", "5"),
        ("64.", "64"),
        (r"58\,204", "58204"),
        ("29{,}322", "29322"),
        (r"a\,b", r"a\,b"),
        ("1, 2, ...", "1, 2, ..."),
    ],
)
def test_normalising_keeps_the_meaning(answer, expected):
    assert normalise(answer) == expected


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("7", "7.0", True),
        ("1,234", "1234", True),
        ("-7", "7", False),
        ("1000000", "1000001", False),
        ("0.333333", "0.3333333", True),
        ("0.33", "0.333333", False),
        ("0.000001", "0.0000012", False),
        ("0", "0.0000001", False),
        ("+5", "5", True),
        (".5", "0.5", True),
        ("1/2", "0.5", True),
        ("-\\frac{10}{4}", "-2.5", True),
        ("5", "\\dfrac{10}{2}", True),
        ("1/3", "0.333333", True),
        ("1/3", "0.3333", False),
        ("5", "11/2", False),
    ],
)
def test_plain_numbers_compare_as_numbers(gold, answer, same):
    assert same_number(plain_number(gold), plain_number(answer)) is same


@pytest.mark.parametrize(
    "text", ["1/0", "1/2/3", "-1/-2", "\\frac12", "1e5", "6,-8", "1,23", "", "٣", "1" * 50, "x", "5 i"]
)
def test_other_answers_are_no_plain_numbers(text):
    assert plain_number(text) is None
