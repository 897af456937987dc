"""The child's end of the record socket: a :class:`erpo_core.records.Sink` that sends in the background.

Records leave in the order of ``emit`` and are numbered from 1. What the recorder has not acknowledged is bounded; then
``emit`` waits, which holds the computation back while the database is down. A watchdog ends the attempt, without any
goodbye, when the socket closes or the permit runs out: from then on another worker may own the job.
"""

import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from erpo_core.records import Checkpoint, Record, encode_frame, read_frame, to_frames
from workers.processes import ATTEMPT_VARIABLE, boottime, kill_attempt

WINDOW_RECORDS = 4096
WINDOW_BYTES = 64 * 2**20
_WATCH_SECONDS = 0.2


def kill_own_attempt(reason: str) -> None:
    """End every process of this attempt, this one last. Does not return."""
    os.write(2, f"erpo: the attempt ends: {reason}\n".encode())
    if mark := os.environ.get(ATTEMPT_VARIABLE):
        kill_attempt(mark)
    os.kill(os.getpid(), signal.SIGKILL)


class Channel:
    """A connected record socket. Closing it waits until the last record is in the database."""

    def __init__(self, path: str, *, on_lost: Callable[[str], None] = kill_own_attempt) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._on_lost = on_lost
        self._changed = threading.Condition()
        self._outbox: deque[bytes] = deque()
        self._sizes: dict[int, int] = {}
        self._bytes = 0
        self._last = 0
        self._permit: float | None = None
        self._closing = False
        for target in (self._send, self._receive, self._watch):
            threading.Thread(target=target, name=f"channel{target.__name__}", daemon=True).start()

    def emit(self, record: Record) -> None:
        """Queue a record; waits while the recorder is a whole window behind, and until a checkpoint is stored."""
        for header, payload in to_frames(record):
            self._queue(header, payload)
        if isinstance(record, Checkpoint):
            with self._changed:
                number = self._last
                self._changed.wait_for(lambda: number not in self._sizes)

    def _queue(self, header: dict[str, Any], payload: bytes) -> None:
        with self._changed:
            self._changed.wait_for(self._has_room)
            self._last += 1
            frame = encode_frame({"n": self._last, **header}, payload)
            self._sizes[self._last] = len(frame)
            self._bytes += len(frame)
            self._outbox.append(frame)
            self._changed.notify_all()

    def close(self) -> None:
        """Wait until every record is acknowledged, then hang up. The watchdog bounds the wait."""
        with self._changed:
            self._changed.wait_for(lambda: not self._sizes)
            self._closing = True
            self._changed.notify_all()
        self._socket.close()

    def _has_room(self) -> bool:
        return len(self._sizes) < WINDOW_RECORDS and self._bytes < WINDOW_BYTES

    def _send(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._outbox or self._closing)
                if self._closing:
                    return
                frame = self._outbox.popleft()
            try:
                self._socket.sendall(frame)
            except OSError as error:
                self._lose(f"the recorder hung up ({error})")
                return

    def _receive(self) -> None:
        try:
            while True:
                message, _ = read_frame(self._read_exactly)
                self._take(message)
        except (OSError, EOFError, ValueError):
            self._lose("the recorder hung up")

    def _take(self, message: dict) -> None:
        with self._changed:
            if "permit" in message:
                self._permit = message["permit"]
            for number in [n for n in self._sizes if n <= message.get("ack", 0)]:
                self._bytes -= self._sizes.pop(number)
            self._changed.notify_all()

    def _watch(self) -> None:
        while not self._closing:
            if self._permit is not None and boottime() > self._permit:
                self._lose("its permit ran out: the worker could not renew the lease")
                return
            time.sleep(_WATCH_SECONDS)

    def _lose(self, reason: str) -> None:
        if not self._closing:
            self._on_lost(reason)

    def _read_exactly(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = self._socket.recv(size - len(parts))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)
