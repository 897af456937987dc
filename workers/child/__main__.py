"""``python -m workers.child job.json``: compute one attempt of one job, report through ``ERPO_RECORD_SOCKET``.

``job.json`` holds ``{"kind", "spec", "inputs"}``; ``inputs`` is that of :class:`erpo_core.job.JobInputs`. stdout and
stderr are the job's log. The last record says how it ended; the exit code is 0 if that record could be sent.
"""

import ctypes
import json
import os
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from erpo_core.errors import ErpoError
from erpo_core.job import JobInputs
from erpo_core.records import Ended
from workers.child.channel import Channel
from workers.child.guard import follow_parent, settle_in
from workers.child.ranks import (
    Silence,
    become_launcher,
    end_rank,
    is_first_rank,
    is_rank,
    tell_failure,
    wanted_processes,
)
from workers.child.stop import StopFlag

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
KINDS = ("train", "evaluate", "entropy", "perturbation", "branch")
_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


def main(path: str) -> int:
    """Run the job that a file describes."""
    job = json.loads(Path(path).read_text())
    if is_rank():
        follow_parent()
    else:
        settle_in()
        if (count := wanted_processes(job)) > 1:
            become_launcher(count, job["spec"]["hardware"]["strategy"], path)
    keep_freed_memory()
    stop = StopFlag()
    stop.listen()
    channel = Channel(os.environ["ERPO_RECORD_SOCKET"]) if is_first_rank() else Silence()
    ended = run_job(job, channel, stop)
    channel.emit(ended)
    channel.close()
    if is_rank():
        if ended.status == "failed" and not is_first_rank():
            tell_failure(ended, Path(path).parent)
        end_rank(leaves_group=ended.status != "failed")  # after a failure the others may still wait for this one
    return 0


def run_job(job: dict[str, Any], channel: Channel, stop: StopFlag) -> Ended:
    """Compute, and say how it ended; this is the border that no exception crosses."""
    try:
        run, inputs = entry_of(job["kind"]), JobInputs.from_json(job["inputs"])
        result = run(parse(job["kind"], job["spec"]), inputs, channel, stop)
    except BaseException as error:
        traceback.print_exc()
        return Ended("failed", failure_code(error), failure_message(error))
    return Ended("stopped") if result.get("stopped") else Ended("succeeded")


def entry_of(kind: str) -> Callable[..., dict[str, Any]]:
    """The entry function of a job kind.

    Raises:
        ErpoError: no such kind.
    """
    if kind not in KINDS:
        raise ErpoError(f"unknown job kind {kind!r}", code="invalid_spec")
    set_threads()
    return import_module(f"workers.child.{kind}").run


def parse(kind: str, body: dict[str, Any]) -> Any:
    """The stored specification as its model."""
    from erpo_core.specs import parse_spec

    return parse_spec(kind, body)


def set_threads() -> None:
    """As many threads as this process may use, unless the environment says otherwise; before torch is imported."""
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    # A waiting thread spins some ten microseconds, then sleeps. The default spins for milliseconds and takes the cores
    # from whoever else computes (seen to slow both by five times); never to spin costs a decoding step half its speed.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def keep_freed_memory() -> None:
    """glibc gives large blocks back at once, and every tensor of a step would be paged in anew: a fifth of its time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26)):
            libc.mallopt(option, value)


def failure_code(error: BaseException) -> str:
    """The ``status_reason`` that an exception becomes."""
    if isinstance(error, ErpoError):
        return error.code
    text = str(error).lower()
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(t in text for t in _MEMORY_TEXTS)):
        return "oom"
    if type(error).__name__ == "ValidationError":
        return "invalid_spec"
    return "failed"


def failure_message(error: BaseException) -> str:
    """One line for people."""
    if isinstance(error, ErpoError):
        return error.told
    return f"{type(error).__name__}: {error}"[:2000]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
