"""Several processes for one job: the child becomes torchrun, which starts itself again as ranks."""

import os
import sys
from typing import Any

from erpo_core.records import Record
from workers.child.guard import SUPERVISOR_VARIABLE

RANK_VARIABLE = "RANK"
"""torchrun's."""


def wanted_processes(job: dict[str, Any]) -> int:
    """Of a job file: one for each device that a training asks for."""
    hardware = job["spec"].get("hardware") or {}
    return max(1, hardware.get("num_gpus", 0)) if job["kind"] == "train" else 1


def is_rank() -> bool:
    """Has torchrun started this process?"""
    return RANK_VARIABLE in os.environ


def is_first_rank() -> bool:
    """Is this the process that reports?"""
    return os.environ.get(RANK_VARIABLE, "0") == "0"


def become_launcher(count: int, path: str) -> None:
    """Go on as torchrun with ``count`` ranks of this job. Does not return; the process id stays."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    os.environ[SUPERVISOR_VARIABLE] = str(os.getpid())  # the ranks' parent
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "workers.child", path]
    os.execv(sys.executable, [sys.executable, *launch])


class Silence:
    """The sink of a rank that does not report."""

    def emit(self, record: Record) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""
