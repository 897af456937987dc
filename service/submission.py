"""From a valid specification to a queued job: admission, one transaction, a bell."""

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends
from sqlalchemy.orm import Session

from erpo_core.errors import SpecError
from erpo_core.memory import model_size
from erpo_core.specs import JobKind
from service.admission import Admitted, admit
from service.auth import Submitter
from service.db import jobs as job_rows
from service.deps import AppSettings, Bell, Db
from service.errors import RequestError
from service.estimate import estimate
from service.idempotency import Answer, OnlyOnce
from service.shape import job_json


@dataclass(frozen=True)
class _Desk:
    """Takes orders of one request."""

    database: Db
    settings: AppSettings
    principal: Submitter
    once: OnlyOnce
    bell: Bell

    def submit(self, kind: JobKind, spec: Any) -> Answer:
        """Queue a job: 202 and where it is.

        Raises:
            SpecError: a reference is wrong; nothing is queued.
        """
        admitted: list[Admitted] = []

        def check() -> None:
            admitted.append(self._admit(spec))

        def create(session: Session) -> Answer:
            self._check_room(session)
            options = spec.job.model_dump(mode="json") | {"depends_on": admitted[0].depends_on}
            first, *more = [one.model_dump(mode="json", exclude={"job"}) for one in admitted[0].spec.each()]
            owner = self.principal.owner
            job = job_rows.create_job(session, kind=kind, spec=first, options=options, owner=owner, more=more)
            session.flush()
            return Answer(202, job_json(job), {"Location": f"/jobs/{job.id}"})

        answer = self.once.run(create, before=check)
        self.bell.ring(answer.body["id"])
        return answer

    def estimate(self, kind: JobKind, spec: Any) -> Answer:
        """Validate and estimate; nothing is queued."""
        admitted = self._admit(spec)
        spec = admitted.spec
        body = {
            "valid": True,
            "kind": kind,
            "spec": spec.model_dump(mode="json", exclude={"job"}),
            "estimate": estimate(
                spec,
                admitted.num_problems,
                size=model_size(spec.model, self.settings.model_roots),
                num_tokens=admitted.num_tokens,
                num_eval_problems=admitted.num_eval_problems,
            ),
            "depends_on": admitted.depends_on,
        }
        return Answer(200, body)

    def _admit(self, spec: Any) -> Admitted:
        admitted = admit(self.database, self.settings, self.principal, spec)
        wanted = estimate(admitted.spec, admitted.num_problems, num_tokens=admitted.num_tokens)["trace_bytes"]
        quota = self.settings.max_trace_bytes_per_job
        if wanted is not None and wanted > quota:
            raise SpecError(
                f"it may store {wanted} bytes of token traces; a job may store {quota}",
                mend="analyse fewer or shorter answers, or raise ERPO_MAX_TRACE_BYTES_PER_JOB",
                code="quota_exceeded",
            )
        return admitted

    def _check_room(self, session: Session) -> None:
        limit = self.settings.max_queued_jobs
        if job_rows.count_queued(session) >= limit:
            raise RequestError(f"{limit} jobs are waiting already; try again later", code="queue_full")


Desk = Annotated[_Desk, Depends()]
