"""Golds are read before a job is queued, for a bounded time, and again by the worker."""

import json
import time

import pytest

pytest.importorskip("math_verify")

from erpo_core.data.formats import Problem
from erpo_core.data.golds import check_dataset_golds, check_golds
from erpo_core.errors import DatasetError
from erpo_core.rewards.verify import MAX_ANSWER_CHARS, Reading, Verifier

SLOW = ["(" * 330 + f"x{number}" + ")" * 330 for number in range(16)]
"""Each takes seconds to read."""
FEW_SECONDS = 20
"""On a busy machine the verifier alone may take some to start; all of ``SLOW`` take longer."""


@pytest.fixture(scope="module")
def verifier():
    with Verifier() as running:
        running.read_golds(["2x"])
        yield running


def problems(*golds):
    return [Problem(str(number), "p", gold) for number, gold in enumerate(golds)]


def test_golds_that_are_not_read_in_time_are_let_pass(verifier):
    started = time.monotonic()
    assert verifier.read_golds([*SLOW, "7"], seconds=0.5) == [*[Reading.TEXT] * len(SLOW), Reading.EXPRESSION]
    assert time.monotonic() - started < 3
    assert verifier.read_golds(["2x", "\\frac{}{}"], seconds=30) == [Reading.EXPRESSION, Reading.NOTHING]


def test_a_gold_that_is_longer_than_any_answer_that_is_read_is_refused(verifier):
    check_golds(problems("7", "1" * MAX_ANSWER_CHARS), verifier)
    with pytest.raises(DatasetError, match=r"answer of 1, .* has 2001 characters") as caught:
        check_golds(problems("7", "1" * (MAX_ANSWER_CHARS + 1)), verifier, pointer="/eval_benchmarks/0")
    assert (caught.value.pointer, caught.value.code) == ("/eval_benchmarks/0", "unreadable_gold")
    assert caught.value.mend


def test_thousands_of_plain_numbers_take_no_process():
    started = time.monotonic()
    with Verifier() as verifier:
        assert check_golds(problems(*map(str, range(8000))), verifier) == 0
    assert time.monotonic() - started < 2


def test_a_request_waits_for_all_its_files_together_and_not_for_long(tmp_path):
    for name, golds in (("slow", SLOW), ("bad", ["\\frac{}{}"])):
        rows = [{"problem": "p", "answer": gold} for gold in golds]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    started = time.monotonic()
    until = started + 1
    check_dataset_golds("data:slow.jsonl", tmp_path, until=until)
    check_dataset_golds("data:bad.jsonl", tmp_path, until=until)  # no time is left for it
    assert time.monotonic() - started < FEW_SECONDS
    started = time.monotonic()
    check_dataset_golds("data:slow.jsonl", tmp_path)
    assert time.monotonic() - started < 1, "nobody waits for a file again"
    with pytest.raises(DatasetError, match="read as nothing"):
        check_dataset_golds("data:bad.jsonl", tmp_path)
