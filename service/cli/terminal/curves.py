"""Curves in the terminal, out of braille dots: two columns and four rows of dots in each character."""

import itertools
from collections.abc import Sequence

from rich.text import Text

_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bits of a braille character by column and row."""


def curve(
    steps: Sequence[float], values: Sequence[float | None], *, title: str, width: int = 56, height: int = 6, style: str
) -> Text:
    """A line through (step, value) with its axis: ``height`` rows of ``width`` characters and two of labels.

    Points without a value are left out. Without any point the text says so.
    """
    points = [(s, v) for s, v in zip(steps, values, strict=True) if v is not None and v == v]
    out = Text()
    out.append(title, "bold")
    if not points:
        return out.append("  no values", "dim")
    first, last = points[0][1], points[-1][1]
    out.append(f"  {first:.3g} → {last:.3g}\n", "dim")
    low, high = _domain([v for _, v in points])
    rows = _raster(points, low, high, width, height)
    for index, row in enumerate(rows):
        label = {0: f"{high:.3g}", len(rows) - 1: f"{low:.3g}"}.get(index, "")
        out.append(f"{label:>7} ", "dim").append("│", "dim").append(row, style).append("\n")
    ends = f"{points[0][0]:g}", f"{points[-1][0]:g} steps"
    out.append(" " * 8 + "└" + "─" * width + "\n", "dim")
    return out.append(" " * 9 + ends[0] + ends[1].rjust(width - len(ends[0])), "dim")


def _domain(values: list[float]) -> tuple[float, float]:
    """Bounds that hold all values; from 0 where that wastes little, never empty."""
    low, high = min(values), max(values)
    if 0 <= low < 0.6 * high:
        low = 0.0
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _raster(points, low: float, high: float, width: int, height: int) -> list[str]:
    columns, lines = width * 2, height * 4
    start, end = points[0][0], points[-1][0]
    spread = (end - start) or 1
    placed = [
        (
            round((step - start) / spread * (columns - 1)) if end > start else columns // 2,
            round((high - value) / (high - low) * (lines - 1)),
        )
        for step, value in points
    ]
    cells = [[0] * width for _ in range(height)]
    for x, y in _joined(placed):
        cells[y // 4][x // 2] |= _DOTS[x % 2][y % 4]
    return ["".join(chr(0x2800 + bits) for bits in row) for row in cells]


def _joined(placed: list[tuple[int, int]]):
    """Every dot on the straight lines between neighbouring points."""
    yield placed[0]
    for (x0, y0), (x1, y1) in itertools.pairwise(placed):
        length = max(abs(x1 - x0), abs(y1 - y0), 1)
        for i in range(1, length + 1):
            yield round(x0 + (x1 - x0) * i / length), round(y0 + (y1 - y0) * i / length)
