"""The verifier survives every answer, and credits only right ones."""

import os
import time
from pathlib import Path

import pytest

pytest.importorskip("math_verify")

from erpo_core.rewards.verify import Verdict, Verifier


def boxed(content: str) -> str:
    return f"The answer is \\boxed{{{content}}}."


@pytest.fixture(scope="module")
def verifier():
    with Verifier(deadline=20) as running:
        yield running


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("7", "7"),
        (r"\frac{1}{2}", "0.5"),
        ("2x+1", "1+2x"),
        ("6,-8", "6, -8"),
        (r"\sqrt{2}", "2^{1/2}"),
        ("(1,2)", "(1, 2)"),
        ("58204", r"58\,204"),
        ("64", "64."),
        (r"7.4 \times 10^{-12}", r"7.4 \cdot 10^{-12}"),
        ("9", r"9\%"),
        (r"\text{Evelyn}", "Evelyn"),
    ],
)
def test_equal_answers_are_right(verifier, gold, answer):
    assert verifier.check(gold, boxed(answer)) is Verdict.RIGHT


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("7", "8"),
        ("2x+1", "2"),
        ("6,-8", "6"),
        (r"7.4 \times 10^{-12}", "0.0"),
        (r"1.3 \times 10^{-27}", r"5 \times 10^{-20}"),
        (r"\frac{1}{2^{80}}", r"\frac{1}{2^{81}}"),
        ("0", "0.000000001"),
    ],
)
def test_other_answers_are_wrong(verifier, gold, answer):
    assert verifier.check(gold, boxed(answer)) is Verdict.WRONG


@pytest.mark.parametrize(
    "text", ["", "42", boxed(""), boxed("  "), boxed("7\0"), "\\boxed{" * 5000, "\\boxed{7", boxed("9" * 3000)]
)
def test_no_readable_box_is_unparsable(verifier, text):
    assert verifier.check("7", text) is Verdict.UNPARSABLE


def test_thousands_of_boxes_count_as_the_last(verifier):
    assert verifier.check("2x+1", boxed("5") * 5000 + boxed("1+2x")) is Verdict.RIGHT


def test_verdicts_come_in_order_and_repeats_are_asked_once(verifier):
    pairs = [("3x", boxed("x+x+x")), ("3x", boxed("2x")), ("3", "none"), ("3x", boxed("x+x+x"))] * 50
    expected = [Verdict.RIGHT, Verdict.WRONG, Verdict.UNPARSABLE, Verdict.RIGHT] * 50
    assert verifier.check_many(pairs) == expected
    started = time.perf_counter()
    assert verifier.check_many(pairs) == expected
    assert time.perf_counter() - started < 0.5


TOWERS = [r"\dfrac{5^{(5^{(5^{(5^5)})}-4)}-5}{16}", "9^{9^{9^{9}}}", "10^9!", r"\binom{10^9}{5 \cdot 10^8}"]


def test_power_towers_end_at_the_deadline_and_the_next_answer_is_checked():
    with Verifier(deadline=2, processes=2) as verifier:
        started = time.monotonic()
        verdicts = verifier.check_many([("5", boxed(tower)) for tower in TOWERS])
        assert time.monotonic() - started < 60
        assert Verdict.TIMEOUT in verdicts
        assert Verdict.RIGHT not in verdicts
        assert verifier.check("2x+1", boxed("1+2x")) is Verdict.RIGHT


def test_a_killed_process_is_a_crash_and_another_takes_over():
    with Verifier(deadline=60, processes=2) as verifier:
        assert verifier.check("2x+1", boxed("1+2x")) is Verdict.RIGHT
        os.kill(verifier._servers[0]._process.pid, 9)
        verifier._servers[0]._process.wait()
        assert verifier.check("3x+1", boxed("1+3x")) is Verdict.CRASHED
        assert verifier.check("3x+1", boxed("1+3x")) is Verdict.RIGHT


def test_a_process_starts_only_where_the_others_are_busy():
    with Verifier(deadline=60, processes=4) as verifier:
        assert [server._process for server in verifier._servers] == [None] * 4
        verifier.check("2x+1", boxed("1+2x"))
        assert [server._process is None for server in verifier._servers] == [False, True, True, True]


def test_closing_ends_the_processes():
    verifier = Verifier(deadline=60)
    verifier.check("2x+1", boxed("1+2x"))
    process = verifier._servers[0]._process
    verifier.close()
    assert process.poll() is not None


def test_memory_is_bounded():
    with Verifier(deadline=60) as verifier:
        verifier.check("2x+1", boxed("1+2x"))
        limits = Path(f"/proc/{verifier._servers[0]._process.pid}/limits").read_text()
        assert str(2 * 2**30) in next(line for line in limits.splitlines() if "address space" in line)
