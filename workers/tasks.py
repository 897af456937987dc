"""What a bell does: claim jobs and run them until none is eligible. Bells may come twice, late or never."""

import logging
import shutil
import threading
from collections.abc import Callable

from erpo_core.errors import ErpoError
from erpo_core.job import JobInputs
from service.db.claims import Claim
from service.db.engine import Database
from service.settings import Settings
from workers import claims
from workers.claims import Attempt
from workers.heart import Heart
from workers.outcome import Outcome
from workers.resolve import checkpoint_folders, damaged_checkpoints, resolve_inputs, surplus_checkpoints
from workers.supervisor import CHILD_COMMAND, Supervisor, write_job_file

log = logging.getLogger(__name__)


class Desk:
    """Works off the queue, one job at a time: bells wait for their turn, the poll only looks if nobody works."""

    def __init__(self, settings: Settings, worker_id: str, stopping: threading.Event) -> None:
        self._settings = settings
        self._worker_id = worker_id
        self._stopping = stopping
        self._database = Database(settings.database_url)
        self._busy = threading.Lock()

    def ring(self) -> int:
        """Run what is eligible; how many jobs that were. Waits while another job runs in this worker."""
        with self._busy:
            return self._work_off()

    def poll_until_stopped(self) -> None:
        """Look at the queue now and then, for the bells that never came."""
        while not self._stopping.wait(self._settings.sweep_seconds):
            if self._busy.acquire(blocking=False):
                try:
                    self._work_off()
                finally:
                    self._busy.release()

    def wait_until_idle(self, seconds: float) -> bool:
        """True once no job runs here."""
        if not self._busy.acquire(timeout=seconds):
            return False
        self._busy.release()
        return True

    def _work_off(self) -> int:
        count = 0
        while not self._stopping.is_set():
            claim = self._claim()
            if claim is None:
                break
            self._run(claim)
            count += 1
        return count

    def _claim(self) -> Claim | None:
        try:
            return claims.claim_next(self._database, self._settings, self._worker_id)
        except ConnectionError as error:
            log.warning("the queue is out of reach: %s", error)
            return None

    def _run(self, claim: Claim) -> None:
        """The border of the worker: whatever happens to a job, the next one runs."""
        attempt = Attempt(self._database, self._settings, claim)
        log.info("%s: %s starts", attempt.mark, claim.kind)
        try:
            outcome = self._supervise(attempt, claim)
        except ErpoError as error:
            outcome = Outcome("failed", error.code, error.code, error.told)
            attempt.finish(outcome)
        except ConnectionError:
            outcome = Outcome("requeued", "database_unavailable")
            attempt.finish(outcome)
        except Exception as error:
            log.exception("%s: the supervisor failed", attempt.mark)
            outcome = Outcome("failed", "internal_error", "internal_error", f"{type(error).__name__}: {error}")
            attempt.finish(outcome)
        log.info("%s: %s", attempt.mark, outcome or "lost")

    def _supervise(self, attempt: Attempt, claim: Claim) -> Outcome | None:
        with Heart(attempt, self._settings, lambda until: None):
            inputs = self._prepare(attempt, claim)
        job_file = write_job_file(inputs, claim.kind, claim.spec)
        supervisor = Supervisor(
            attempt,
            self._settings,
            self._stopping,
            command=self._settings.child_command or CHILD_COMMAND,
            time_limit_seconds=claim.time_limit_seconds,
            at_end=lambda: self._make_room(attempt, claim),
        )
        return supervisor.run(job_file)

    def _prepare(self, attempt: Attempt, claim: Claim) -> JobInputs:
        with claims.waitable(), self._database.read() as session:
            folders = checkpoint_folders(session, claim)
        for step in damaged_checkpoints(folders):
            attempt.drop_checkpoint(step)
        with claims.waitable(), self._database.read() as session:
            inputs = resolve_inputs(session, claim, self._settings)
        self._make_room(attempt, claim)  # an attempt whose worker was lost has not done it at its end
        return inputs

    def _make_room(self, attempt: Attempt, claim: Claim) -> None:
        with claims.waitable(), self._database.read() as session:
            surplus = surplus_checkpoints(session, claim)
        for step, folder in surplus.items():
            attempt.remove_checkpoint(step)
            shutil.rmtree(folder, ignore_errors=True)


def start_thread(target: Callable[[], None], name: str) -> threading.Thread:
    """A daemon thread."""
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread
