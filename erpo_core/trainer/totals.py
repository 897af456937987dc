"""Numbers of a step, summed before they are divided: over micro-batches, ranks and steps alike."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

TOKEN_COLUMNS = ("entropy", "credit", "gate")
"""Columns of the rows that are kept of every active token: H, |A^| and W."""


class Totals:
    """Numerators with denominators, extreme values, and one row for each token, for what no sum can give."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._peaks: dict[str, float] = {}
        self._lows: dict[str, float] = {}
        self._tokens: list[Tensor] = []

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, name: str, total: float, count: float) -> None:
        """Counts towards the mean ``total / count``."""
        pair = self._sums[name]
        pair[0] += total
        pair[1] += count

    def add_values(self, name: str, values: Tensor) -> None:
        """Counts each value towards the mean."""
        self.add(name, values.double().sum().item(), values.numel())

    def add_moments(self, name: str, values: Tensor) -> None:
        """Counts each value towards the mean and the standard deviation; see :meth:`std`."""
        self.add_values(name, values)
        self.add_values(f"{name}^2", values.double().square())

    def peak(self, name: str, value: float) -> None:
        """Keeps the largest."""
        self._peaks[name] = max(value, self._peaks.get(name, value))

    def low(self, name: str, value: float) -> None:
        """Keeps the smallest."""
        self._lows[name] = min(value, self._lows.get(name, value))

    def add_tokens(self, *columns: Tensor) -> None:
        """One row for each token, in the order of ``TOKEN_COLUMNS``; (N,) each."""
        self._tokens.append(torch.stack([column.detach().float().cpu() for column in columns], 1))

    def merge(self, state: Any) -> None:
        """Take in what another rank has; ``state`` is its :meth:`state`."""
        sums, peaks, lows, tokens = state
        for name, pair in sums.items():
            self.add(name, *pair)
        for name, value in peaks.items():
            self.peak(name, value)
        for name, value in lows.items():
            self.low(name, value)
        self._tokens += tokens

    def state(self) -> Any:
        """All of it, picklable."""
        sums = {name: tuple(pair) for name, pair in self._sums.items()}
        return sums, dict(self._peaks), dict(self._lows), list(self._tokens)

    def mean(self, name: str) -> float:
        """NaN where nothing was counted."""
        total, count = self._sums.get(name, (0.0, 0.0))
        return total / count if count else float("nan")

    def std(self, name: str, *, correction: int = 0) -> float:
        """Standard deviation of what :meth:`add_moments` counted, ``count - correction`` in the denominator."""
        mean, count = self.mean(name), self._sums.get(name, (0.0, 0.0))[1]
        if count <= correction:
            return float("nan")
        return (max(self.mean(f"{name}^2") - mean**2, 0.0) * count / (count - correction)) ** 0.5

    def means(self) -> dict[str, float]:
        """Every mean, every largest and every smallest value."""
        plain = {name: self.mean(name) for name in self._sums if not name.endswith("^2")}
        return plain | self._peaks | self._lows

    def tokens(self) -> Tensor:
        """(N, columns) of all tokens."""
        return torch.cat(self._tokens) if self._tokens else torch.empty(0, len(TOKEN_COLUMNS))
