"""Short ways to put jobs and records into a test's database."""

from service.db import claims, events, jobs, records
from service.db.claims import Claim
from service.db.engine import Database
from service.db.models import Job, JobEvent, Run


def submit(
    database: Database, kind: str = "train", spec: dict | None = None, owner: str | None = None, **options
) -> Job:
    """A queued job."""
    with database.write() as session:
        return jobs.create_job(session, kind=kind, spec=spec or {"model": "m"}, options=options, owner=owner)


def claim(database: Database, worker_id: str = "worker-a") -> Claim | None:
    """What a worker of the default queue gets."""
    with database.write() as session:
        return claims.claim_next(session, queues=["default"], worker_id=worker_id, lease_seconds=60)


def store(database: Database, owned: Claim, *batch) -> None:
    """Records of one attempt, in one transaction."""
    with database.write() as session:
        records.apply_records(
            session, job_id=owned.job_id, run_id=owned.run_id, attempt=owned.attempt, records=list(batch)
        )


def finish(database: Database, owned: Claim, outcome: str, **details) -> None:
    """The end of one attempt."""
    with database.write() as session:
        claims.finish_attempt(session, owned.job_id, owned.attempt, outcome=outcome, **details)


def call(database: Database, function, *arguments, **options):
    """One function of ``service.db`` in a transaction of its own."""
    with database.write() as session:
        return function(session, *arguments, **options)


def job_of(database: Database, job_id: str) -> Job:
    """The job as it is stored."""
    with database.read() as session:
        return jobs.get_job(session, job_id)


def run_of(database: Database, run_id: str) -> Run:
    """The run as it is stored."""
    with database.read() as session:
        return jobs.get_run(session, run_id)


def history(database: Database, job_id: str, type_: str | None = None) -> list[JobEvent]:
    """The job's events, or those of one type."""
    with database.read() as session:
        found = events.list_events(session, job_id, limit=10_000)
    return [event for event in found if type_ in (None, event.type)]


def path_of(database: Database, job_id: str) -> list[str]:
    """The statuses that the job has had, by its events."""
    return [event.data["to"] for event in history(database, job_id, "job.status")]
