"""Runs: summaries, metric series, answers, checkpoints."""

import csv
import io
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from erpo_core.errors import NotFoundError, SpecError
from erpo_core.metric_names import METRICS, describe
from service.archive import stream_tar
from service.auth import Reader
from service.db import jobs as job_rows
from service.db import metrics as metric_rows
from service.db import runs as run_rows
from service.deps import AppSettings, Db
from service.negotiation import accepts
from service.pagination import DEFAULT_LIMIT, Cursor, Limit, page_json
from service.runview import run_detail, run_summary_json
from service.schemas.common import Page, problems
from service.schemas.jobs import JobKindName
from service.schemas.runs import Checkpoint, Completion, Metrics, Run, RunDetail
from service.shape import checkpoint_json, completion_json, finite
from service.visibility import RunId, visible_run

router = APIRouter(tags=["runs"])
Step = Annotated[int | None, Query(ge=0, le=2**31 - 1)]


@router.get("/runs", response_model=Page[Run], responses=problems(400, 401, 422))
def list_runs(
    database: Db,
    principal: Reader,
    kind: JobKindName | None = None,
    cursor: Cursor = None,
    limit: Limit = DEFAULT_LIMIT,
) -> Any:
    """Runs, newest first."""
    with database.read() as session:
        page = run_rows.list_runs(session, kind=kind, owner=principal.sees_only, cursor=cursor, limit=limit)
        return JSONResponse(page_json(page.rows, page.next_cursor, lambda row: run_summary_json(session, row)))


@router.get("/runs/{run_id}", response_model=RunDetail, responses=problems(401, 404))
def get_run(run_id: RunId, database: Db, principal: Reader) -> Any:
    """One run of any kind; with `Accept: text/html` its page."""
    with database.read() as session:
        detail = run_detail(session, visible_run(session, run_id, principal))
        return JSONResponse(detail, headers={"Vary": "Accept"})


@router.get(
    "/runs/{run_id}/metrics",
    response_model=Metrics,
    responses={200: {"content": {"text/csv": {}}}, **problems(401, 404, 422)},
)
def read_metrics(
    request: Request,
    run_id: RunId,
    database: Db,
    principal: Reader,
    names: Annotated[str | None, Query(max_length=2000, description="Separated by commas; all if absent.")] = None,
    step_min: Step = None,
    step_max: Step = None,
    max_points: Annotated[int, Query(ge=2, le=10_000, description="Per series.")] = 1000,
    smoothing: Annotated[float | None, Query(ge=0, lt=1, description="EMA weight of the past.")] = None,
) -> Any:
    """Metric series in columns; with `Accept: text/csv` rows of name, step, value, min, max."""
    wanted = [name.strip() for name in names.split(",") if name.strip()] if names else None
    with database.read() as session:
        run = visible_run(session, run_id, principal)
        if wanted:
            _check_names(wanted, metric_rows.read_summary(session, run.id))
        status = job_rows.get_job(session, run.job_id).status
        found = metric_rows.read_metrics(
            session,
            run.id,
            names=wanted,
            step_min=step_min,
            step_max=step_max,
            max_points=max_points,
            smoothing=None if smoothing is None else 1 - smoothing,
        )
    series = finite(found)
    headers = {"Vary": "Accept", "Cache-Control": "no-cache"}
    if accepts(request, "text/csv"):
        return Response(_csv(series), headers=headers, media_type="text/csv; charset=utf-8")
    return JSONResponse({"run_id": run_id, "status": status, "series": series}, headers=headers)


def _check_names(wanted: list[str], stored: Iterable[str]) -> None:
    """Raises SpecError for a name that no run reports: an empty series would look like one that is still to come."""
    known = {*stored, *METRICS}
    for name in wanted:
        if name not in known and describe(name) is None:
            close = get_close_matches(name, sorted(known), n=3, cutoff=0.5)
            mend = f"write {' or '.join(f'`{match}`' for match in close)}" if close else "leave `names` out to see all"
            raise SpecError(f"no metric is called {name!r}", pointer="/query/names", mend=mend)


@router.get("/runs/{run_id}/completions", response_model=Page[Completion], responses=problems(400, 401, 404))
def list_completions(
    run_id: RunId,
    database: Db,
    principal: Reader,
    step: Step = None,
    cursor: Cursor = None,
    limit: Limit = DEFAULT_LIMIT,
) -> Any:
    """Sampled answers with rewards and advantages."""
    with database.read() as session:
        run = visible_run(session, run_id, principal)
        page = run_rows.list_completions(session, run.id, step=step, cursor=cursor, limit=limit)
        return JSONResponse(page_json(page.rows, page.next_cursor, completion_json))


@router.get("/runs/{run_id}/checkpoints", response_model=Page[Checkpoint], responses=problems(401, 404))
def list_checkpoints(run_id: RunId, database: Db, principal: Reader) -> Any:
    """Checkpoints, by step."""
    with database.read() as session:
        run = visible_run(session, run_id, principal)
        return JSONResponse(page_json(run_rows.list_checkpoints(session, run.id), None, checkpoint_json))


@router.get(
    "/runs/{run_id}/checkpoints/{step}/archive",
    responses={200: {"content": {"application/x-tar": {}}}, **problems(401, 404)},
)
def download_checkpoint(
    run_id: RunId,
    step: Annotated[int, Path(ge=0, le=2**31 - 1)],
    database: Db,
    settings: AppSettings,
    principal: Reader,
) -> Response:
    """The files of a checkpoint as one tar archive."""
    with database.read() as session:
        run = visible_run(session, run_id, principal)
        found = [row for row in run_rows.list_checkpoints(session, run.id) if row.step == step]
        if not found:
            raise NotFoundError(f"run {run_id} has no checkpoint of step {step}")
        folder = found[-1].path
    content, size = stream_tar(folder, settings.artifacts_dir)
    name = f"{run_id}-step-{step}.tar"
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Content-Length": str(size)}
    return StreamingResponse(content, headers=headers, media_type="application/x-tar")


def _csv(series: dict[str, Any]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("name", "step", "value", "min", "max"))
    for name, columns in series.items():
        rows = zip(columns["step"], columns["value"], columns["min"], columns["max"], strict=True)
        writer.writerows((name, *row) for row in rows)
    return text.getvalue()
