"""A thread in every worker: says that the worker lives, rings again, expires silent leases.

Every action is a compare-and-set in the database, so any number of sweepers may run. Clocks of different machines are
never compared: a lease is expired by whoever has seen its heartbeat counter stand still for long enough on its own
clock.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable

from service.db import claims
from service.db.engine import Database
from service.settings import Settings
from workers.abilities import abilities
from workers.claims import waitable
from workers.heart import lease_margin
from workers.processes import boottime

log = logging.getLogger(__name__)


class Sweeper:
    """``run`` it in a thread; ``sweep`` is one look, for whoever keeps the time."""

    def __init__(self, settings: Settings, worker_id: str, ring: Callable[[str], None]) -> None:
        self._settings = settings
        self._worker_id = worker_id
        self._ring = ring
        self._database = Database(settings.database_url)
        self._seen: dict[tuple[str, int], tuple[int, float]] = {}
        self._swept_at = 0.0
        self._is_registered = False

    def run(self, stopping: threading.Event) -> None:
        """Look every heartbeat until stopped."""
        while not stopping.is_set():
            self.step()
            stopping.wait(min(self._settings.heartbeat_seconds, self._settings.sweep_seconds))

    def step(self) -> None:
        """One look; nothing that goes wrong here ends the thread."""
        try:
            with waitable():
                self.beat()
                self.expire_leases()
                if boottime() - self._swept_at >= self._settings.sweep_seconds:
                    self.ring_again()
                    self._swept_at = boottime()
        except ConnectionError as error:
            log.warning("no sweep: %s", error)
        except Exception:
            log.exception("sweep")

    def beat(self) -> None:
        """This worker lives."""
        with self._database.write() as session:
            if self._is_registered:
                claims.beat_worker(session, self._worker_id)
            else:
                claims.register_worker(
                    session,
                    self._worker_id,
                    host=socket.gethostname(),
                    pid=os.getpid(),
                    queues=list(self._settings.queues),
                    abilities=abilities(),
                )
        self._is_registered = True

    def expire_leases(self) -> list[str]:
        """Take jobs from workers that have been silent for a lease and a margin; their ids."""
        with self._database.read() as session:
            leases = claims.running_leases(session)
        now = boottime()
        patience = self._settings.lease_seconds + lease_margin(self._settings.lease_seconds)
        seen, expired = {}, []
        for lease in leases:
            key = (lease.job_id, lease.attempt)
            count, since = self._seen.get(key, (lease.heartbeat_seq, now))
            seen[key] = (count, since) if count == lease.heartbeat_seq else (lease.heartbeat_seq, now)
            if now - seen[key][1] > patience:
                expired.append(key)
        self._seen = seen
        return [job_id for job_id, attempt in expired if self._expire(job_id, attempt)]

    def ring_again(self) -> None:
        """For every job that has waited for longer than a sweep: its bell may be lost."""
        with self._database.read() as session:
            waiting = claims.unclaimed_jobs(session, self._settings.sweep_seconds)
        for job_id in waiting:
            self._ring(job_id)

    def _expire(self, job_id: str, attempt: int) -> bool:
        with self._database.write() as session:
            status = claims.expire_attempt(session, job_id, attempt)
        log.warning("%s:%s: its worker is silent; the job is %s", job_id, attempt, status)
        if status == "queued":
            self._ring(job_id)
        return status is not None
