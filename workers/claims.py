"""An attempt as its supervisor sees it: what may be read and written in the database, and nothing else.

The SQL is in ``service.db``. Here the database being away becomes ``ConnectionError``, which callers wait out.
"""

import contextlib
import logging
import time
from collections.abc import Iterator

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from erpo_core.errors import ConflictError, FencedError, UnavailableError
from erpo_core.records import Record
from service.db import claims, jobs, records
from service.db.engine import Database
from service.settings import Settings
from workers.outcome import Outcome

log = logging.getLogger(__name__)
_RETRY_SECONDS = 0.5


@contextlib.contextmanager
def waitable() -> Iterator[None]:
    """Turn "the database is out of reach" into ConnectionError; programming errors stay what they are."""
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeout, UnavailableError) as error:
        raise ConnectionError(str(error)) from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise ConnectionError(str(error)) from error
        raise


def claim_next(database: Database, settings: Settings, worker_id: str) -> claims.Claim | None:
    """Claim the best eligible job of this worker's queues, if there is one."""
    with waitable(), database.write() as session:
        return claims.claim_next(
            session, queues=list(settings.queues), worker_id=worker_id, lease_seconds=settings.lease_seconds
        )


class Attempt:
    """One claimed attempt. Every write is fenced: FencedError says that the job belongs to another attempt."""

    def __init__(self, database: Database, settings: Settings, claim: claims.Claim) -> None:
        self.claim = claim
        self.mark = f"{claim.job_id}:{claim.attempt}"
        self._database = database
        self._settings = settings
        self._is_running = False

    def heartbeat(self) -> str | None:
        """Renew the lease; what the user wants of the job."""
        with self._write() as session:
            return claims.heartbeat(session, self.claim.job_id, self.claim.attempt, self._settings.lease_seconds)

    def desired(self) -> str | None:
        """What the user wants of the job: ``paused``, ``cancelled``, ``cancelled_now`` or nothing."""
        with waitable(), self._database.read() as session:
            job = jobs.get_job(session, self.claim.job_id)
            if job.attempt != self.claim.attempt:
                raise FencedError(f"{self.claim.job_id} is at attempt {job.attempt}", state=job.status)
            return job.desired_status

    def apply(self, batch: list[Record]) -> None:
        """Store records in one transaction; the first ones make the job ``running``."""
        with self._write() as session:
            if not self._is_running:
                claims.mark_running(session, self.claim.job_id, self.claim.attempt)
            records.apply_records(
                session,
                job_id=self.claim.job_id,
                run_id=self.claim.run_id,
                attempt=self.claim.attempt,
                records=batch,
            )
        self._is_running = True

    def drop_checkpoint(self, step: int) -> None:
        """Go back to the checkpoint before a damaged one."""
        with self._write() as session:
            claims.drop_checkpoint(session, self.claim.job_id, self.claim.attempt, step)

    def remove_checkpoint(self, step: int) -> None:
        """Forget a checkpoint that makes room; its files are to be deleted afterwards."""
        with self._write() as session:
            claims.remove_checkpoint(session, self.claim.job_id, self.claim.attempt, step)

    def append_log(self, data: bytes) -> None:
        """Store a piece of the log; what is beyond the job's bound is dropped."""
        try:
            with self._write() as session:
                records.append_log(
                    session, self.claim.job_id, self.claim.attempt, data, self._settings.log_bytes_per_job
                )
        except FencedError:
            return

    def finish(self, outcome: Outcome, *, log_tail: str = "") -> bool:
        """Write how the attempt ended, trying again while the database is away; false if it is another's by then."""
        error = None
        if outcome.code is not None:
            error = {"code": outcome.code, "message": outcome.message, "log_tail": log_tail}
        end = time.monotonic() + 2 * self._settings.lease_seconds
        while time.monotonic() < end:
            try:
                with self._write() as session:
                    claims.finish_attempt(
                        session,
                        self.claim.job_id,
                        self.claim.attempt,
                        outcome=outcome.outcome,
                        reason=outcome.reason,
                        error=error,
                    )
            except ConflictError as refusal:
                log.warning("%s: its end was not written: %s", self.mark, refusal.message)
                return False
            except ConnectionError:
                time.sleep(_RETRY_SECONDS)
            else:
                return True
        return False

    @contextlib.contextmanager
    def _write(self) -> Iterator[Session]:
        with waitable(), self._database.write() as session:
            yield session
