"""Can the verifier read the golds? Asked before a token is sampled: an unreadable gold makes every answer wrong.

Light: the reading happens in a verifier process, and only where math-verify is installed.
"""

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from erpo_core.data.datasets import local_file, local_problems
from erpo_core.data.formats import Problem
from erpo_core.errors import DatasetError
from erpo_core.rewards.verify import Reading, Verifier

MAX_BEFORE_QUEUEING = 1000
"""Golds that a request waits for; the worker reads all of them again."""


def check_golds(problems: Sequence[Problem], verifier: Verifier, *, pointer: str = "/dataset") -> int:
    """Refuse golds that are read as nothing.

    Returns:
        How many golds are compared as text only, because no mathematics is found in them.

    Raises:
        DatasetError: ``unreadable_gold``, naming the first such problem.
    """
    readings = verifier.read_golds([problem.answer for problem in problems])
    for problem, reading in zip(problems, readings, strict=True):
        if reading is Reading.NOTHING:
            raise DatasetError(
                f"the answer of {problem.id}, {problem.answer[:80]!r}, is read as nothing: no response could match it",
                pointer=pointer,
                mend="write the final answer in LaTeX, as it belongs inside \\boxed{}",
                code="unreadable_gold",
            )
    return sum(reading is Reading.TEXT for reading in readings)


def check_dataset_golds(ref: str, data_root: Path | None, *, pointer: str = "/dataset") -> None:
    """:func:`check_golds` of a data set that lies here as a file; once for each state of that file.

    Tasks and hub data sets are left to the worker, and so is everything where math-verify is not installed.

    Raises:
        DatasetError: as :func:`check_golds`.
    """
    path = local_file(ref, data_root, pointer=pointer)
    if path is None or importlib.util.find_spec("math_verify") is None:
        return
    state = path.stat()
    error = _fault(ref, Path(data_root), state.st_mtime_ns, state.st_size)
    if error is not None:
        raise DatasetError(error.message, pointer=pointer, mend=error.mend, code=error.code)


@lru_cache(maxsize=256)
def _fault(ref: str, data_root: Path, _mtime_ns: int, _size: int) -> DatasetError | None:
    try:
        with Verifier() as verifier:
            check_golds((local_problems(ref, data_root) or [])[:MAX_BEFORE_QUEUEING], verifier)
    except DatasetError as error:
        return error
    return None
