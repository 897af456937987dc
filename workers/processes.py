"""The processes of an attempt: found by the mark in their environment and by descent, and killed until none is left.

``accelerate launch`` and vLLM start processes in sessions of their own, so that killing a process group leaves them
alive; every process that an attempt starts inherits ``ERPO_ATTEMPT=<job>:<n>``, and that is what it is known by.
"""

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

import psutil

ATTEMPT_VARIABLE = "ERPO_ATTEMPT"
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def die_with_parent(signal_number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when the thread that started it ends (Linux)."""
    _prctl(_PR_SET_PDEATHSIG, signal_number)


def adopt_orphans() -> None:
    """Become the parent of every orphaned descendant, so that none escapes by a double fork (Linux)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def boottime() -> float:
    """Seconds on a clock that goes on while the machine sleeps and is the same in every process."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def attempt_processes(mark: str, *, root: psutil.Process | None = None) -> list[psutil.Process]:
    """Living processes whose environment carries ``ERPO_ATTEMPT=<mark>``, and the descendants of ``root``.

    The calling process is never among them.
    """
    found = {pid: psutil.Process(pid) for pid in _marked(mark) if psutil.pid_exists(pid)}
    if root is not None:
        found |= {process.pid: process for process in _descendants(root)}
    found.pop(os.getpid(), None)
    return [process for process in found.values() if _is_alive(process)]


def kill_attempt(mark: str, *, root: psutil.Process | None = None, seconds: float = 10.0) -> bool:
    """SIGKILL the processes of an attempt until none is left; true once that is so, false after ``seconds``."""
    end = time.monotonic() + seconds
    while living := attempt_processes(mark, root=root):
        for process in living:
            signal_process(process, signal.SIGKILL)
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def signal_process(process: psutil.Process, number: int) -> None:
    """Signal a process; one that is already gone is no error."""
    try:
        process.send_signal(number)
    except psutil.Error:
        return


def reap_orphans(since: float) -> None:
    """Collect adopted processes that have ended, so that they do not stay behind as zombies.

    ``since`` (seconds since the epoch) spares the children of others in this process.
    """
    for process in psutil.Process().children():
        try:
            if process.status() == psutil.STATUS_ZOMBIE and process.create_time() >= since:
                os.waitpid(process.pid, os.WNOHANG)
        except (psutil.Error, ChildProcessError):
            continue


def _marked(mark: str) -> list[int]:
    needle = f"{ATTEMPT_VARIABLE}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        if needle in environment.split(b"\0"):
            found.append(int(folder.name))
    return found


def _descendants(root: psutil.Process) -> list[psutil.Process]:
    """Itself and all below it. psutil compares start times: a process number that was given away is nobody's."""
    try:
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _prctl(option: int, value: int) -> None:
    """Linux only; elsewhere the marks in the environment are what there is."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        libc.prctl(option, value, 0, 0, 0)


def ranks_of(launcher: int) -> list[psutil.Process]:
    """The processes that the launcher has started for a job; none where the job is one process."""
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(launcher).children():
            with contextlib.suppress(psutil.Error):
                if "LOCAL_RANK" in process.environ():
                    found.append(process)
    return found
