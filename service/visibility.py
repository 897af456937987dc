"""Runs as a caller may see them."""

from typing import Annotated, Any

from fastapi import Path
from sqlalchemy.orm import Session

from erpo_core.errors import NotFoundError
from service.auth import Principal
from service.db import jobs as job_rows
from service.db import runs as run_rows
from service.shape import run_path

RunId = Annotated[str, Path(max_length=64, description="`run_...`")]


def visible_run(session: Session, run_id: str, principal: Principal, kind: str | None = None) -> Any:
    """The run, if the caller may see it and it is of the kind that the path speaks of.

    Raises:
        NotFoundError: otherwise; for a run of another kind it names the right path.
    """
    run = run_rows.get_run(session, run_id)
    job = job_rows.get_job(session, run.job_id)
    principal.check_sees(job.owner, f"run {run_id}")
    if kind is not None and run.kind != kind:
        raise NotFoundError(f"{run_id} is a run of kind {run.kind}: see {run_path(run.kind, run_id)}")
    return run
