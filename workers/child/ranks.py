"""Several processes for one job: the child becomes `accelerate launch`, which starts itself again as ranks."""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from erpo_core.launch import launcher
from erpo_core.records import Ended, Record
from workers.child.guard import SUPERVISOR_VARIABLE
from workers.processes import boottime

RANK_VARIABLE = "RANK"
"""torchrun's."""
_FAILURE = "failed-rank-"


@dataclass(frozen=True)
class Failure:
    """What one of the processes of a job has failed of, and when (CLOCK_BOOTTIME)."""

    ended: Ended
    at: float


def wanted_processes(job: dict[str, Any]) -> int:
    """Of a job file: one for each device that a training asks for."""
    hardware = job["spec"].get("hardware") or {}
    return max(1, hardware.get("num_gpus", 0)) if job["kind"] == "train" else 1


def is_rank() -> bool:
    """Has the launcher started this process?"""
    return RANK_VARIABLE in os.environ


def is_first_rank() -> bool:
    """Is this the process that reports?"""
    return os.environ.get(RANK_VARIABLE, "0") == "0"


def become_launcher(count: int, strategy: str, path: str) -> None:
    """Go on as the launcher of ``count`` ranks of this job. Does not return; the process id stays."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    os.environ[SUPERVISOR_VARIABLE] = str(os.getpid())  # the ranks' parent
    os.execv(sys.executable, [sys.executable, *launcher(strategy, count), "-m", "workers.child", path])


def tell_failure(ended: Ended, folder: Path) -> None:
    """Of a rank that does not report, for the supervisor: the others may wait for it for ever."""
    path = folder / f"{_FAILURE}{os.getpid()}.json"
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps({"code": ended.code, "message": ended.message, "at": boottime()}))
    draft.replace(path)


def failure_of_a_rank(folder: Path) -> Failure | None:
    """What :func:`tell_failure` has left in the attempt's folder: of several, the cause."""
    found = (json.loads(path.read_text()) for path in folder.glob(f"{_FAILURE}*.json"))
    failures = [Failure(Ended("failed", one["code"], one["message"]), one["at"]) for one in found]
    return cause(failures) if failures else None


def cause(failures: Iterable[Failure]) -> Failure:
    """Of processes that work together one fails, and the others have lost their peer: the one is that which has a code
    of its own, or the first."""
    return min(failures, key=lambda failure: (failure.ended.code == "failed", failure.at))


def end_rank(*, leaves_group: bool) -> NoReturn:
    """End this process. A thread of gloo's may still hold the tensors of its last work and want Python to let go of
    them: where the interpreter is going down by then, it aborts the process, and the launcher ends the other ranks. So
    the interpreter does not go down."""
    import torch.distributed as dist

    if leaves_group and dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class Silence:
    """The sink of a rank that does not report."""

    def emit(self, record: Record) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""
