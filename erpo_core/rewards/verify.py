"""Checking answers under a deadline, whatever the answer is."""

import json
import math
import os
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from contextlib import suppress
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from erpo_core.errors import RunError
from erpo_core.rewards.answers import extract_boxed, normalise, plain_number, same_number

MAX_ANSWER_CHARS = 2000
"""Of an answer, and of a gold: what is longer is not read."""
RULES_VERSION = 3
"""Counts changes of what is equal beyond math-verify's own, see docs/answers.md: 1 read boxes as plain text
too, 2 did not read commands of setting."""
_START_SECONDS = 120.0
_CACHE_SIZE = 100_000
_SOURCE_ROOT = str(Path(__file__).resolve().parents[2])


def verifier_version() -> str | None:
    """math-verify's version and that of our rules, ``0.9.0+3``: part of an evaluation's identity. None without it."""
    try:
        return f"{version('math-verify')}+{RULES_VERSION}"
    except PackageNotFoundError:
        return None


class Verdict(StrEnum):
    """What became of an answer. Only ``right`` is ever credited."""

    RIGHT = "right"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"
    """No balanced box, an empty one, or one that holds nothing readable."""
    TIMEOUT = "timeout"
    CRASHED = "crashed"


class Reading(StrEnum):
    """What the verifier makes of a gold."""

    EXPRESSION = "expression"
    TEXT = "text"
    """No mathematics: only an answer of the same text is right."""
    NOTHING = "nothing"


class Verifier:
    """A pool of verifier processes, started when first needed. A context manager; safe to share between threads.

    Args:
        deadline: seconds for one answer; then its process is killed and another started.
        processes: how many check at the same time.
    """

    def __init__(self, *, deadline: float = 5.0, processes: int = 1) -> None:
        self._deadline = deadline
        self._servers = [_Server(deadline) for _ in range(processes)]
        self._cache: OrderedDict[tuple[str, str], Verdict] = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            for server in self._servers:
                server.kill()

    def check(self, gold: str, text: str) -> Verdict:
        """The verdict on one response."""
        return self.check_many([(gold, text)])[0]

    def check_many(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts on (gold, response) pairs: the response's last box against the gold.

        Raises:
            RunError: ``verifier_unavailable``: no verifier process starts.
        """
        with self._lock:
            keys = [(normalise(gold), normalise(extract_boxed(text) or "")) for gold, text in pairs]
            known = {key: verdict for key in keys if (verdict := self._at_once(key)) is not None}
            open_keys = [key for key in dict.fromkeys(keys) if key not in known]
            asked = self._ask([{"gold": gold, "answer": answer} for gold, answer in open_keys])
            for key, verdict in zip(open_keys, map(Verdict, asked), strict=True):
                known[key] = verdict
                if verdict is not Verdict.CRASHED:
                    self._remember(key, verdict)
            return [known[key] for key in keys]

    def match_many(self, pattern: str, texts: Sequence[str]) -> list[Verdict]:
        """``right`` where a regular expression is found: under the deadline too, since some backtrack for ever."""
        with self._lock:
            return list(map(Verdict, self._ask([{"pattern": pattern, "text": text} for text in texts])))

    def read_golds(self, golds: Sequence[str], *, seconds: float | None = None) -> list[Reading]:
        """What golds are read as. One that cannot be read within the deadline is text: only its like can be right.

        ``seconds``: for all of them together, once a process runs; what is not read by then counts as text.
        """
        tidied = list(map(normalise, golds))
        known = {gold: Reading.EXPRESSION for gold in tidied if plain_number(gold) is not None}
        open_golds = [gold for gold in dict.fromkeys(tidied) if gold not in known]
        with self._lock:
            asked = self._ask([{"gold": gold} for gold in open_golds], seconds)
        readings = {*Reading}
        known |= {g: Reading(r) if r in readings else Reading.TEXT for g, r in zip(open_golds, asked, strict=True)}
        return [known[gold] for gold in tidied]

    def _at_once(self, key: tuple[str, str]) -> Verdict | None:
        """The verdict where it needs no mathematics."""
        gold, answer = key
        if not answer or not gold or len(answer) > MAX_ANSWER_CHARS or "\0" in answer:
            return Verdict.UNPARSABLE
        if gold == answer:
            return Verdict.RIGHT
        expected, found = plain_number(gold), plain_number(answer)
        if expected is not None and found is not None:
            return Verdict.RIGHT if same_number(expected, found) else Verdict.WRONG
        if key in self._cache:
            self._cache.move_to_end(key)
        return self._cache.get(key)

    def _remember(self, key: tuple[str, str], verdict: Verdict) -> None:
        self._cache[key] = verdict
        if len(self._cache) > _CACHE_SIZE:
            self._cache.popitem(last=False)

    def _ask(self, requests: list[dict[str, str]], seconds: float | None = None) -> list[str]:
        """Hand the requests to whichever process is free, and kill those that overrun.

        After ``seconds`` those that wait are not asked any more: ``timeout``.
        """
        verdicts: list[str] = [Verdict.TIMEOUT] * len(requests)
        waiting = deque(enumerate(requests))
        busy: dict[_Server, int] = {}
        if waiting:
            self._servers[0].start()
        end = math.inf if seconds is None else time.monotonic() + seconds
        try:
            while (waiting and time.monotonic() < end) or busy:
                for server in self._servers:
                    if waiting and server not in busy and time.monotonic() < end:
                        index, request = waiting.popleft()
                        server.send(request, end)
                        busy[server] = index
                if not busy:
                    break
                for server, verdict in _answered(list(busy)):
                    verdicts[busy.pop(server)] = verdict
        except BaseException:
            for server in busy:  # its answer would be taken for that of the next request
                server.kill()
            raise
        return verdicts


def _answered(busy: list["_Server"]) -> list[tuple["_Server", str]]:
    """Wait until one has answered, died or overrun."""
    wait = max(0.0, min(server.expires for server in busy) - time.monotonic())
    readable, _, _ = select.select([server.output for server in busy], [], [], wait)
    now, found = time.monotonic(), []
    for server in busy:
        if server.output in readable:
            verdict = server.receive()
            if verdict is not None:
                found.append((server, verdict))
                continue
        if now >= server.expires:
            server.kill()
            found.append((server, Verdict.TIMEOUT))
    return found


class _Server:
    """One verifier process, or none yet."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self.expires = 0.0

    @property
    def output(self) -> int:
        """File descriptor to wait on."""
        return self._process.stdout.fileno()

    def send(self, request: dict[str, str], end: float = math.inf) -> None:
        """Pass a request on, and start the clock. ``end``: of its time at the latest."""
        line = json.dumps(request).encode() + b"\n"
        self.start()
        self.expires = min(end, time.monotonic() + self._deadline)
        with suppress(BrokenPipeError):  # a process that has just died is seen when its answer is read
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def receive(self) -> str | None:
        """What came: a verdict, ``crashed`` if the process is gone, None if the line is not complete yet."""
        block = os.read(self.output, 65536)
        self._buffer += block
        if not block:
            self.kill()
            return Verdict.CRASHED
        if not self._buffer.endswith(b"\n"):
            return None
        line, self._buffer = self._buffer, b""
        return json.loads(line)["verdict"]

    def kill(self) -> None:
        """End the process; the next request starts another."""
        process, self._process, self._buffer = self._process, None, b""
        if process is None:
            return
        process.kill()
        process.wait()
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()

    def start(self) -> None:
        """Start the process, if there is none.

        Raises:
            RunError: ``verifier_unavailable``.
        """
        if self._process is not None:
            return
        # The environment stays: its marker is how a supervisor finds what belongs to an attempt.
        path = os.pathsep.join(filter(None, [_SOURCE_ROOT, os.environ.get("PYTHONPATH", "")]))
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        # multiprocessing's pools fail inside Celery's daemonic workers; a plain process works everywhere.
        command = [sys.executable, "-m", "erpo_core.rewards.verify_server", str(self._deadline + 5)]
        # A session of its own: the SIGTERM that asks a job's process group to leave must not turn its last step's
        # answers into wrong ones.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, start_new_session=True
        )
        ready, _, _ = select.select([self.output], [], [], _START_SECONDS)
        if not ready or not self._process.stdout.readline():
            self.kill()
            raise RunError("the verifier process does not start; its log says why", code="verifier_unavailable")
