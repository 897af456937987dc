"""Can the verifier read the golds? Asked before a token is sampled: an unreadable gold makes every answer wrong.

Light: the reading happens in a verifier process, and only where math-verify is installed.
"""

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from erpo_core.data.datasets import local_file, local_problems
from erpo_core.data.formats import Problem
from erpo_core.errors import DatasetError
from erpo_core.rewards.verify import MAX_ANSWER_CHARS, Reading, Verifier

MAX_BEFORE_QUEUEING = 1000
SECONDS_BEFORE_QUEUEING = 5.0
"""Golds of a file, and time for all files together, that a request waits for; the worker reads them again, and more."""
SECONDS_IN_A_WORKER = 60.0
"""One process reads 75 to 250 golds a second, and plain numbers in no time: 7,500 rows of GSM8K in 0.03 s."""


def check_golds(
    problems: Sequence[Problem],
    verifier: Verifier,
    *,
    pointer: str = "/dataset",
    seconds: float | None = SECONDS_IN_A_WORKER,
) -> int:
    """Refuse golds that are too long or read as nothing.

    Args:
        seconds: to read them in, None: as long as it takes; those that are not read by then are let pass.

    Returns:
        How many golds are compared as text only, because no mathematics is found in them.

    Raises:
        DatasetError: ``unreadable_gold``, naming the first such problem.
    """
    for problem in problems:
        if len(problem.answer) > MAX_ANSWER_CHARS:
            what = f"has {len(problem.answer)} characters: more than {MAX_ANSWER_CHARS} are not read"
            raise _unreadable(problem, what, pointer, "leave out problems with so long an answer")
    readings = verifier.read_golds([problem.answer for problem in problems], seconds=seconds)
    for problem, reading in zip(problems, readings, strict=True):
        if reading is Reading.NOTHING:
            mend = "write the final answer in LaTeX, as it belongs inside \\boxed{}"
            raise _unreadable(problem, "is read as nothing: no response could match it", pointer, mend)
    return sum(reading is Reading.TEXT for reading in readings)


def _unreadable(problem: Problem, what: str, pointer: str, mend: str) -> DatasetError:
    message = f"the answer of {problem.id}, {problem.answer[:80]!r}, {what}"
    return DatasetError(message, pointer=pointer, mend=mend, code="unreadable_gold")


def check_dataset_golds(
    ref: str, data_root: Path | None, *, pointer: str = "/dataset", until: float | None = None
) -> None:
    """:func:`check_golds` of a data set that lies here as a file; once for each state of that file.

    Tasks and hub data sets are left to the worker, and so is everything where math-verify is not installed.

    Args:
        until: by ``time.monotonic()``; golds that are not read by then are left to the worker too.

    Raises:
        DatasetError: as :func:`check_golds`.
    """
    path = local_file(ref, data_root, pointer=pointer)
    if path is None or importlib.util.find_spec("math_verify") is None:
        return
    seconds = SECONDS_BEFORE_QUEUEING if until is None else until - time.monotonic()
    if seconds <= 0:
        return
    state = path.stat()
    error = _fault(_File(ref, Path(data_root), state.st_mtime_ns, state.st_size, seconds))
    if error is not None:
        raise DatasetError(error.message, pointer=pointer, mend=error.mend, code=error.code)


@dataclass(frozen=True)
class _File:
    """A state of a file. The time there was to read it is no part of what was found: nobody waits for it again."""

    ref: str
    data_root: Path
    mtime_ns: int
    num_bytes: int
    seconds: float = field(compare=False)


@lru_cache(maxsize=256)
def _fault(file: _File) -> DatasetError | None:
    try:
        with Verifier() as verifier:
            problems = (local_problems(file.ref, file.data_root) or [])[:MAX_BEFORE_QUEUEING]
            check_golds(problems, verifier, seconds=file.seconds)
    except DatasetError as error:
        return error
    return None
