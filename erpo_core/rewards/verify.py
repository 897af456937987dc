"""Checking answers with a hard deadline: a verifier process that is killed and started again when it hangs."""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from enum import StrEnum

from erpo_core.rewards.answers import MAX_ANSWER_CHARS, extract_boxed

_START_SECONDS = 60.0
_CACHE_SIZE = 100_000


class Verdict(StrEnum):
    """What became of one check."""

    RIGHT = "right"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"
    """No boxed answer, or one that means nothing."""
    TIMEOUT = "timeout"
    """The check was killed at its deadline."""
    CRASHED = "crashed"
    """The check ran out of memory, or its process died."""


class Verifier:
    """One verifier process; a context manager. Works in threads of Celery workers and plain scripts alike."""

    def __init__(self, deadline_seconds: float = 5.0) -> None:
        self._deadline = deadline_seconds
        self._process: subprocess.Popen | None = None
        self._pending = b""
        self._cache: dict[tuple[str, str], Verdict] = {}

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def check(self, gold: str, text: str) -> Verdict:
        """Is the last boxed answer in ``text`` equal to ``gold``?"""
        return self.check_answer(gold, extract_boxed(text))

    def check_many(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """:meth:`check` for each (gold, text)."""
        return [self.check(gold, text) for gold, text in pairs]

    def check_answer(self, gold: str, answer: str | None) -> Verdict:
        """Is an extracted answer equal to ``gold``?"""
        if not answer or len(answer) > MAX_ANSWER_CHARS:
            return Verdict.UNPARSABLE
        key = (gold, answer)
        if key not in self._cache:
            if len(self._cache) >= _CACHE_SIZE:
                self._cache.clear()
            self._cache[key] = self._ask(gold, answer)
        return self._cache[key]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
        self._process, self._pending = None, b""

    def _ask(self, gold: str, answer: str) -> Verdict:
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            self._process.stdin.flush()
            line = self._read_line(self._deadline)
        except (BrokenPipeError, EOFError):
            self.close()
            return Verdict.CRASHED
        if line is None:
            self.close()
            return Verdict.TIMEOUT
        return Verdict(json.loads(line))

    def _start(self) -> None:
        command = [sys.executable, "-m", "erpo_core.rewards.verify_server"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            bufsize=0,
        )
        # Imports are paid here and not against the first answer's deadline.
        with contextlib.suppress(BrokenPipeError, EOFError):
            self._process.stdin.write(b'["\\\\frac{1}{2}", "0.5"]\n')
            self._read_line(_START_SECONDS)

    def _read_line(self, seconds: float) -> bytes | None:
        end = time.monotonic() + seconds
        while b"\n" not in self._pending:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return None
            data = os.read(self._process.stdout.fileno(), 65536)
            if not data:
                raise EOFError
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line
