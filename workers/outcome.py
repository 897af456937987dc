"""How an attempt ended: one table from what was seen to what the job becomes."""

import signal
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from erpo_core.records import Ended

_ONE_WAS_KILLED = "a process of the job was killed because the machine ran out of memory"


class Order(IntEnum):
    """What the supervisor was told while the child ran; a higher one overrides a lower one."""

    NONE = 0
    PAUSE = 1
    """The user asked: checkpoint and leave."""
    LEAVE = 2
    """The worker itself shall stop: checkpoint, and back into the queue."""
    TIMEOUT = 3
    """The job's time limit is over."""
    CANCEL = 4
    """The user asked: checkpoint, leave, and do not come back."""
    CANCEL_NOW = 5
    """The same without a checkpoint."""
    REFUSED = 6
    """A record could not be stored: what follows would be missing something."""
    LOST = 7
    """The job is another attempt's, or the lease could not be renewed."""


@dataclass(frozen=True)
class Outcome:
    """``outcome`` is one of the state machine's; ``code`` and ``message`` are the error's, where there is one."""

    outcome: str
    reason: str | None = None
    code: str | None = None
    message: str | None = None


def classify(
    order: Order,
    ended: Ended | None,
    returncode: int,
    *,
    out_of_memory: bool,
    num_processes: int = 1,
    detail: str = "",
) -> Outcome:
    """What became of an attempt that is over. Not for LOST: then nothing may be written.

    Args:
        ended: the child's own last word, if it had one.
        returncode: of ``subprocess``: negative for a signal.
        out_of_memory: the machine counted an out-of-memory kill while the child ran.
        num_processes: that train together. Where one is killed, another fails of that it is gone, or their launcher.
        detail: why a record was refused, or which time limit was passed.
    """
    if ended is not None and ended.status == "succeeded":
        return Outcome("succeeded")
    if order is Order.REFUSED:
        return _failed("record_refused", f"a record of the child could not be stored: {detail}")
    if order in (Order.CANCEL, Order.CANCEL_NOW):
        return Outcome("cancelled", "user_request")
    if order is Order.TIMEOUT:
        return _failed("timeout", f"the time limit of {detail} s passed")
    one_was_killed = out_of_memory and num_processes > 1
    if ended is not None and ended.status == "failed":
        if one_was_killed and ended.code == "failed":
            return _failed("oom", f"{_ONE_WAS_KILLED}; another one says: {ended.message}")
        return _failed(ended.code or "failed", ended.message or "the child reported a failure")
    if order is Order.PAUSE:
        return Outcome("paused", "user_request")
    if order is Order.LEAVE:
        return Outcome("requeued", "worker_stopped")
    if one_was_killed and ended is None and returncode > 0:
        return _failed("oom", _ONE_WAS_KILLED)
    return _died(returncode, out_of_memory, stopped=ended is not None)


def _died(returncode: int, out_of_memory: bool, *, stopped: bool) -> Outcome:
    if stopped:
        return _failed("child_killed", "the child was asked to leave by a signal that is not the worker's")
    if returncode == -signal.SIGKILL and out_of_memory:
        return _failed("oom", "the child was killed because the machine ran out of memory")
    if returncode < 0:
        return _failed("child_killed", f"the child was killed by {_signal_name(-returncode)}")
    return _failed("child_crashed", f"the child ended with exit code {returncode} before its job was done")


def _failed(code: str, message: str) -> Outcome:
    return Outcome("failed", code, code, message)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def memory_kills() -> int:
    """How many processes the kernel has killed for memory, in this container if it has a counter of its own."""
    for path in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        try:
            lines = Path(path).read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0
