"""One service at a time on a data directory."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from erpo_core.errors import ConflictError

LOCK_NAME = "erpo.lock"
SERVER_NAME = "server.json"
_LEFTOVER_SECONDS = 15.0
"""Processes of a service whose parent was killed leave by themselves in this time; they hold the lock until then."""


@contextlib.contextmanager
def lock_data_dir(data_dir: Path) -> Iterator[int]:
    """Hold the directory's lock; yields the descriptor, which the service's processes inherit and so hold as well.

    Raises:
        ConflictError: another service runs there; the message names its process and address.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(data_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _lock(descriptor, data_dir)
        yield descriptor
    finally:
        os.close(descriptor)


def write_server(data_dir: Path, url: str) -> None:
    """Say who serves this directory, and where."""
    path = data_dir / SERVER_NAME
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps({"url": url, "pid": os.getpid()}))
    draft.replace(path)


def read_server(data_dir: Path) -> dict | None:
    """``{"url", "pid"}`` of the service on this directory, or None if none is said to run."""
    try:
        return json.loads((data_dir / SERVER_NAME).read_text())
    except (OSError, ValueError):
        return None


def remove_server(data_dir: Path) -> None:
    """Nobody serves this directory any more."""
    (data_dir / SERVER_NAME).unlink(missing_ok=True)


def _lock(descriptor: int, data_dir: Path) -> None:
    end = time.monotonic() + _LEFTOVER_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            server = read_server(data_dir)
            if server is None or _is_running(server["pid"]) or time.monotonic() > end:
                raise _refusal(data_dir, server) from None
            time.sleep(0.1)


def _refusal(data_dir: Path, server: dict | None) -> ConflictError:
    who = f"process {server['pid']}, {server['url']}" if server else "it is just starting"
    return ConflictError(
        f"ERPO Lab already runs on {data_dir} ({who}). Use that one, stop it, or choose another folder: "
        "ERPO_DATA_DIR=/another/folder",
        code="data_dir_in_use",
    )


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
