"""One ``Range: bytes=`` header."""

import re

from service.errors import RequestError

_RANGE = re.compile(r"^bytes=(\d{0,18})-(\d{0,18})$")


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """``(start, end)`` of the one range asked for, end exclusive; None where the whole is asked for.

    Raises:
        RequestError: ``range_not_satisfiable``.
    """
    match = _RANGE.match((header or "").replace(" ", ""))
    if match is None or not (match[1] or match[2]):
        return None
    if match[1]:
        start, end = int(match[1]), min(int(match[2] or size), size - 1) + 1
    else:
        start, end = max(0, size - int(match[2])), size
    if start >= size or end <= start:
        raise RequestError(f"the range lies outside of {size} bytes", code="range_not_satisfiable")
    return start, end
