"""Records of one attempt: from its socket into the database, in order, many to a transaction, fenced by the attempt.

One thread reads frames into a bounded buffer, one writes. When the database is away the writer tries again and the
buffer fills, then the socket, then the child's own window: the child waits and nothing is lost.
"""

import contextlib
import logging
import math
import os
import shutil
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from erpo_core.errors import FencedError
from erpo_core.records import Ended, Record, encode_frame, from_wire, read_frame
from workers.processes import boottime

log = logging.getLogger(__name__)
BUFFER_RECORDS = 2048
BUFFER_BYTES = 64 * 2**20
BATCH_RECORDS = 512
BATCH_BYTES = 16 * 2**20
GATHER_SECONDS = 0.1
"""How long the writer waits for company after a record arrives: fewer transactions, no visible delay."""
_RETRY_SECONDS = 0.5

Apply = Callable[[list[Record]], None]
"""Write a batch in one transaction. FencedError: the job is another attempt's. ConnectionError: try again later."""


class Recorder:
    """A listening record socket; use as a context manager.

    Attributes:
        ended: the child's last record, once written.
        ended_at: when it came (CLOCK_BOOTTIME).
        fenced: the database refused the attempt; nothing more will be written.
        refused: why a record could not be stored, if one could not.
    """

    def __init__(self, apply: Apply) -> None:
        self._apply = apply
        self.ended: Ended | None = None
        self.ended_at = math.inf
        self.fenced = False
        self.refused: str | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="erpo-", dir=_short_folder()))
        self.path = self._folder / "records.sock"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        os.chmod(self.path, 0o600)
        self._listener.listen(1)
        self._connection: socket.socket | None = None
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._buffer: deque[tuple[int, Record, int]] = deque()
        self._bytes = 0
        self._permit: float | None = None
        self._at_end = False
        self._closed = False
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._read, self._write)]

    def __enter__(self) -> "Recorder":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closed = True
        for end in (self._listener, self._connection):
            if end is not None:
                _hang_up(end)
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(5)
        shutil.rmtree(self._folder, ignore_errors=True)

    def permit(self, until: float) -> None:
        """Tell the child until when (CLOCK_BOOTTIME) it may go on; a child that connects later is told then."""
        self._permit = until
        self._tell({"permit": until})

    def drain(self, seconds: float) -> bool:
        """After the child is gone: wait until what it sent is written; false if that took too long."""
        if self._connection is None:
            _hang_up(self._listener)
        with self._changed:
            return self._changed.wait_for(lambda: self._stopped() or (self._at_end and not self._buffer), seconds)

    def _read(self) -> None:
        try:
            self._connection, _ = self._listener.accept()
            if self._permit is not None:
                self._tell({"permit": self._permit})
            stream = _Stream(self._connection)
            while True:
                self._receive(*read_frame(stream.read), size=stream.taken())
        except (OSError, EOFError):
            pass
        except (ValueError, TypeError) as error:
            self._refuse(f"a frame that is none: {error}")
        with self._changed:
            self._at_end = True
            self._changed.notify_all()

    def _receive(self, header: dict, payload: bytes, size: int) -> None:
        record = from_wire(header, payload)
        if isinstance(record, Ended):
            self.ended_at = boottime()
        with self._changed:
            self._changed.wait_for(lambda: self._stopped() or self._has_room())
            self._buffer.append((header["n"], record, size))
            self._bytes += size
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return len(self._buffer) < BUFFER_RECORDS and self._bytes < BUFFER_BYTES

    def _stopped(self) -> bool:
        return self._closed or self.fenced or self.refused is not None

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped() or self._buffer or self._at_end)
                if self._stopped() or not self._buffer:
                    return
                if not self._at_end:
                    self._changed.wait_for(self._stopped, GATHER_SECONDS)
                batch = self._next_batch()
            if not self._commit([record for _, record, _ in batch]):
                return
            self._acknowledge(batch)

    def _next_batch(self) -> list[tuple[int, Record, int]]:
        batch, size = [], 0
        for item in self._buffer:
            if batch and (len(batch) >= BATCH_RECORDS or size + item[2] > BATCH_BYTES):
                break
            batch.append(item)
            size += item[2]
        return batch

    def _commit(self, records: list[Record]) -> bool:
        while not self._closed:
            try:
                self._apply(records)
            except FencedError:
                self._fence()
                return False
            except ConnectionError as error:
                log.warning("records wait for the database: %s", error)
                time.sleep(_RETRY_SECONDS)
            except Exception as error:
                log.exception("records refused")
                self._refuse(f"{type(error).__name__}: {error}")
                return False
            else:
                return True
        return False

    def _acknowledge(self, batch: list[tuple[int, Record, int]]) -> None:
        with self._changed:
            for _, record, size in batch:
                self._buffer.popleft()
                self._bytes -= size
                if isinstance(record, Ended):
                    self.ended = record
            self._changed.notify_all()
        self._tell({"ack": batch[-1][0]})

    def _tell(self, message: dict) -> None:
        if self._connection is None:
            return
        try:
            with self._sending:
                self._connection.sendall(encode_frame(message))
        except OSError:
            return  # The child is gone; its supervisor sees that as well.

    def _fence(self) -> None:
        with self._changed:
            self.fenced = True
            self._changed.notify_all()

    def _refuse(self, reason: str) -> None:
        with self._changed:
            self.refused = self.refused or reason
            self._changed.notify_all()


def _short_folder() -> str | None:
    """A Unix socket's path holds 107 bytes: a deep TMPDIR is passed over."""
    return None if len(tempfile.gettempdir()) < 60 else "/tmp"


class _Stream:
    """Reads a socket and counts."""

    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rb")
        self._count = 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise EOFError
        self._count += size
        return data

    def taken(self) -> int:
        """Bytes since the last call."""
        count, self._count = self._count, 0
        return count


def _hang_up(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
