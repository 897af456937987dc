"""Keeping the problems of some levels: ``3-5``, ``5``, ``1,3``, or a name such as ``hard``."""

import re
from collections.abc import Iterable

from erpo_core.data.formats import Problem
from erpo_core.errors import DatasetError, SpecError

_RANGE = re.compile(r"(\d{1,4})-(\d{1,4})")
_LAST_NUMBER = re.compile(r"(\d{1,4})\s*$")


def check_levels(wanted: str | None, *, pointer: str = "/dataset") -> None:
    """Refuse what names no level.

    Raises:
        SpecError: an empty part, or a range that runs backwards.
    """
    for part in [] if wanted is None else wanted.split(","):
        found = _RANGE.fullmatch(part.strip())
        if not part.strip() or (found and int(found[1]) > int(found[2])):
            raise SpecError(f"level={wanted} names no level", pointer=pointer, mend="write level=3-5, or level=1,3")


def of_levels(problems: list[Problem], wanted: str | None, *, pointer: str = "/dataset") -> list[Problem]:
    """The problems whose level is among the wanted ones; all of them for None. ``Level 5`` is level 5.

    Raises:
        DatasetError: none is.
    """
    if wanted is None:
        return problems
    parts = [part.strip().lower() for part in wanted.split(",")]
    kept = [problem for problem in problems if _is_among(problem.level, parts)]
    if not kept:
        raise DatasetError(
            f"no problem has level {wanted}",
            pointer=pointer,
            mend=f"levels there: {_known(problems)}",
            code="empty_dataset",
        )
    return kept


def _is_among(level: str | int | None, parts: Iterable[str]) -> bool:
    text = str(level).strip().lower()
    number = _LAST_NUMBER.search(text)
    for part in parts:
        found = _RANGE.fullmatch(part)
        if number and found and int(found[1]) <= int(number[1]) <= int(found[2]):
            return True
        if part == text or (number and part == number[1]):
            return True
    return False


def _known(problems: Iterable[Problem], at_most: int = 20) -> str:
    levels = sorted({str(problem.level) for problem in problems if problem.level is not None})
    return ", ".join(levels[:at_most]) or "none"
