"""stdout and stderr of a child: read at once, stored in chunks, up to a bound; never more than a log."""

import os
import select
import threading
import time
from collections.abc import Callable

_FLUSH_SECONDS = 0.5
_FLUSH_BYTES = 64 * 1024
_HELD_BYTES = 2**20
TAIL_BYTES = 4000


class JobLog:
    """Reads a pipe until its end. ``tail`` keeps the last bytes whatever becomes of the rest."""

    def __init__(self, descriptor: int, store: Callable[[bytes], None]) -> None:
        self._descriptor = descriptor
        self._store = store
        self._held = bytearray()
        self._tail = bytearray()
        self._flushed_at = time.monotonic()
        self._finish = threading.Event()
        self._thread = threading.Thread(target=self._run, name="joblog", daemon=True)
        self._thread.start()

    @property
    def tail(self) -> str:
        """The end of the log as text."""
        return bytes(self._tail).decode(errors="replace")

    def close(self, seconds: float) -> None:
        """Read what is left and store it."""
        self._finish.set()
        self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._descriptor], [], [], 0.1)
            data = os.read(self._descriptor, _FLUSH_BYTES) if ready else b""
            self._take(data)
            over = (ready and not data) or (self._finish.is_set() and not ready)
            if over or len(self._held) >= _FLUSH_BYTES or time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
                self._flush()
            if over:
                return

    def _take(self, data: bytes) -> None:
        self._held += data
        self._tail += data
        del self._tail[:-TAIL_BYTES]
        # With the database away the newest part is kept: the child is never held back by its own log.
        del self._held[:-_HELD_BYTES]

    def _flush(self) -> None:
        self._flushed_at = time.monotonic()
        if not self._held:
            return
        try:
            self._store(bytes(self._held))
        except ConnectionError:
            return
        self._held.clear()
