"""One attempt of one job: start its child, watch it, end every process of it, write how it ended.

The supervisor raises nothing that a job could cause. It is over only when no process of the attempt is left.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from erpo_core.job import JobInputs
from erpo_core.records import Ended
from service.settings import Settings
from workers.child.ranks import Failure, cause, failure_of_a_rank, wanted_processes
from workers.claims import Attempt
from workers.heart import Heart
from workers.joblog import JobLog
from workers.outcome import Order, Outcome, classify, memory_kills
from workers.processes import ATTEMPT_VARIABLE, adopt_orphans, kill_attempt, ranks_of, reap_orphans
from workers.recorder import Recorder

log = logging.getLogger(__name__)
CHILD_COMMAND = (sys.executable, "-m", "workers.child")
_LOOK_SECONDS = 0.05
_NOW_SECONDS = 1.0
"""Cancelling without a checkpoint still gives the child this long to close what it holds."""
_FOLLOW_SECONDS = 5.0
"""When a rank has failed the others may fail of the same, and say so, or wait for it. When the child has said its last
word, what it has left running may end, or wait for something."""
_WANTED = {"paused": Order.PAUSE, "cancelled": Order.CANCEL, "cancelled_now": Order.CANCEL_NOW}


class Supervisor:
    """Runs one attempt to its end."""

    def __init__(
        self,
        attempt: Attempt,
        settings: Settings,
        stopping: threading.Event,
        *,
        command: Sequence[str] = CHILD_COMMAND,
        time_limit_seconds: float | None = None,
        at_end: Callable[[], None] = lambda: None,
    ) -> None:
        """``at_end``: what is to be done between the end of the processes and that of the attempt."""
        self._attempt = attempt
        self._settings = settings
        self._stopping = stopping
        self._command = list(command)
        self._time_limit = time_limit_seconds
        self._at_end = at_end
        self._order = Order.NONE
        self._deadline: float | None = None
        self._asked = False
        self._started_at = 0.0

    def run(self, job_file: Path) -> Outcome | None:
        """Run the child on ``job_file``; what the job became, or None if it is another attempt's by now."""
        adopt_orphans()
        kills_before = memory_kills()
        with Recorder(self._attempt.apply) as recorder:
            with Heart(self._attempt, self._settings, recorder.permit) as heart:
                child = self._start(job_file, recorder.path)
                root = psutil.Process(child.pid)
                self._started_at = root.create_time()
                job_log = JobLog(child.stdout.fileno(), self._attempt.append_log)
                try:
                    self._watch(child, recorder, heart, job_file.parent)
                finally:
                    self._end(child, root)
                    recorder.drain(self._settings.lease_seconds)
                    job_log.close(self._settings.lease_seconds)
                    child.stdout.close()
                self._tidy()
            self._look(recorder, heart)
        if self._order is Order.LOST:
            return None
        outcome = classify(
            self._order,
            _last_word(recorder.ended, recorder.ended_at, failure_of_a_rank(job_file.parent)),
            child.returncode,
            out_of_memory=memory_kills() > kills_before,
            num_processes=wanted_processes(json.loads(job_file.read_text())),
            detail=recorder.refused or f"{self._time_limit or 0:g}",
        )
        return outcome if self._attempt.finish(outcome, log_tail=job_log.tail) else None

    def _start(self, job_file: Path, socket_path: Path) -> subprocess.Popen:
        environment = os.environ | {
            ATTEMPT_VARIABLE: self._attempt.mark,
            "ERPO_RECORD_SOCKET": str(socket_path),
            "ERPO_SUPERVISOR_PID": str(os.getpid()),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",  # where a library crashes, the log says what Python was at
        }
        return subprocess.Popen(
            [*self._command, str(job_file)],
            cwd=job_file.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _watch(self, child: subprocess.Popen, recorder: Recorder, heart: Heart, folder: Path) -> None:
        """Until the child has ended by itself, or its time to leave is over, or that to follow its own last word or a
        rank that failed."""
        started, over_at = time.monotonic(), None
        while child.poll() is None:
            self._look(recorder, heart)
            if over_at is None and (recorder.ended is not None or failure_of_a_rank(folder) is not None):
                over_at = time.monotonic()
            if over_at is not None and time.monotonic() - over_at > _FOLLOW_SECONDS:
                return
            if self._time_limit is not None and time.monotonic() - started > self._time_limit:
                self._give(Order.TIMEOUT)
            if self._deadline is not None:
                self._ask_to_leave(child)
                if time.monotonic() > self._deadline:
                    return
            time.sleep(_LOOK_SECONDS)

    def _look(self, recorder: Recorder, heart: Heart) -> None:
        if heart.lost or recorder.fenced:
            self._give(Order.LOST)
        if recorder.refused is not None:
            self._give(Order.REFUSED)
        if self._stopping.is_set():
            self._give(Order.LEAVE)
        if heart.wanted in _WANTED:
            self._give(_WANTED[heart.wanted])

    def _give(self, order: Order) -> None:
        """Follow a stronger order; no order ever gives more time than an earlier one has left."""
        if order <= self._order:
            return
        log.info("%s: %s", self._attempt.mark, order.name.lower())
        self._order = order
        deadline = time.monotonic() + self._patience(order)
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)

    def _patience(self, order: Order) -> float:
        if order in (Order.LOST, Order.REFUSED):
            return 0.0
        if order is Order.CANCEL_NOW:
            return _NOW_SECONDS
        return self._settings.shutdown_seconds if order is Order.LEAVE else self._settings.grace_seconds

    def _ask_to_leave(self, child: subprocess.Popen) -> None:
        """SIGTERM, once: to the ranks where there are any, whose launcher would soon kill them; else to the group."""
        if self._asked:
            return
        self._asked = True
        if ranks := ranks_of(child.pid):
            for process in ranks:
                with contextlib.suppress(psutil.Error):
                    process.terminate()
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)

    def _end(self, child: subprocess.Popen, root: psutil.Process) -> None:
        """Kill what is left of the attempt and collect the child."""
        while not kill_attempt(self._attempt.mark, root=root):
            log.error("%s: processes that cannot be killed; waiting for them", self._attempt.mark)
        child.wait()
        reap_orphans(self._started_at)

    def _tidy(self) -> None:
        """What goes wrong here is done at the next claim, and changes nothing in how this attempt ended."""
        try:
            self._at_end()
        except Exception as error:
            log.warning("%s: not tidied: %s", self._attempt.mark, error)


def _last_word(ended: Ended | None, ended_at: float, of_a_rank: Failure | None) -> Ended | None:
    """The child's, unless it has failed because a rank that does not report had failed."""
    if of_a_rank is None or (ended is not None and ended.status != "failed"):
        return ended
    return of_a_rank.ended if ended is None else cause([Failure(ended, ended_at), of_a_rank]).ended


def write_job_file(inputs: JobInputs, kind: str, spec: dict) -> Path:
    """The file that a child reads, in the attempt's own folder."""
    inputs.work_dir.mkdir(parents=True, exist_ok=True)
    path = inputs.work_dir / "job.json"
    path.write_text(json.dumps({"kind": kind, "spec": spec, "inputs": inputs.to_json()}))
    return path
