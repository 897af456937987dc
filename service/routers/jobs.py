"""Orders: submit, look, steer."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Path, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import AwareDatetime
from starlette.concurrency import run_in_threadpool

from erpo_core.errors import SpecError
from erpo_core.specs import EvaluateSpec, TrainSpec
from service.auth import Principal, Reader, Submitter
from service.db import events as event_rows
from service.db import jobs as job_rows
from service.db import logs as log_rows
from service.deps import Bell, Db, Events
from service.idempotency import Answer, OnlyOnce
from service.negotiation import accepts
from service.pagination import DEFAULT_LIMIT, Cursor, Limit, page_json
from service.ranges import parse_range
from service.schemas.common import Page, problems
from service.schemas.jobs import CancelRequest, Estimate, Event, Job, JobKindName, JobPatch
from service.shape import event_json, job_json
from service.submission import Desk

router = APIRouter(tags=["jobs"])
JobId = Annotated[str, Path(max_length=64, description="`job_...`")]
Seq = Annotated[int, Query(ge=0, le=2**62)]
DryRun = Annotated[bool, Query(description="Validate and estimate; queue nothing.")]
Status = Literal["queued", "starting", "running", "pausing", "paused", "cancelling", "cancelled", "succeeded", "failed"]
_LOG_CHUNK = 2**20
_SEQ_MEND = "give the `seq` of an event, or the next_cursor of the page before"


@router.post(
    "/jobs/train",
    status_code=202,
    response_model=Job,
    responses={200: {"model": Estimate, "description": "`dry_run=true`"}, **problems(401, 403, 409, 422, 429)},
)
def submit_training(
    desk: Desk,
    spec: Annotated[TrainSpec, Body(description="With only `model` and `dataset` it is the paper's setting.")],
    dry_run: DryRun = False,
) -> Response:
    """Train a model with ERPO, GRPO, or on worked solutions (`algorithm: sft`)."""
    return (desk.estimate("train", spec) if dry_run else desk.submit("train", spec)).response()


@router.post(
    "/jobs/evaluate",
    status_code=202,
    response_model=Job,
    responses={200: {"model": Estimate, "description": "`dry_run=true`"}, **problems(401, 403, 409, 422, 429)},
)
def submit_evaluation(desk: Desk, spec: EvaluateSpec, dry_run: DryRun = False) -> Response:
    """Sample answers to a data set's problems and count the right ones."""
    return (desk.estimate("evaluate", spec) if dry_run else desk.submit("evaluate", spec)).response()


@router.get("/jobs", response_model=Page[Job], responses=problems(400, 401, 422))
def list_jobs(
    database: Db,
    principal: Reader,
    kind: JobKindName | None = None,
    status: Status | None = None,
    tag: Annotated[str | None, Query(max_length=64)] = None,
    model: Annotated[str | None, Query(max_length=200)] = None,
    created_after: AwareDatetime | None = None,
    created_before: AwareDatetime | None = None,
    cursor: Cursor = None,
    limit: Limit = DEFAULT_LIMIT,
) -> Any:
    """Jobs, newest first."""
    with database.read() as session:
        page = job_rows.list_jobs(
            session,
            kind=kind,
            status=status,
            tag=tag,
            model=model,
            owner=principal.sees_only,
            created_after=created_after,
            created_before=created_before,
            cursor=cursor,
            limit=limit,
        )
        return JSONResponse(page_json(page.rows, page.next_cursor, job_json))


@router.get("/jobs/{job_id}", response_model=Job, responses=problems(401, 404))
def get_job(job_id: JobId, database: Db, principal: Reader) -> Any:
    """One job."""
    with database.read() as session:
        return JSONResponse(job_json(visible_job(session, job_id, principal)))


@router.post("/jobs/{job_id}/cancel", response_model=Job, responses=problems(401, 403, 404, 409, 422))
def cancel_job(
    job_id: JobId,
    principal: Submitter,
    once: OnlyOnce,
    bell: Bell,
    order: Annotated[CancelRequest | None, Body()] = None,
) -> Response:
    """Stop a job. A cancelled job stays as it is; one that has succeeded or failed: 409."""
    mode = (order or CancelRequest()).mode
    return _steer(job_id, principal, once, bell, lambda session: job_rows.request_cancel(session, job_id, mode))


@router.post("/jobs/{job_id}/pause", response_model=Job, responses=problems(401, 403, 404, 409))
def pause_job(job_id: JobId, principal: Submitter, once: OnlyOnce, bell: Bell) -> Response:
    """Write a checkpoint and stop until `resume`."""
    return _steer(job_id, principal, once, bell, lambda session: job_rows.request_pause(session, job_id))


@router.post("/jobs/{job_id}/resume", response_model=Job, responses=problems(401, 403, 404, 409))
def resume_job(job_id: JobId, principal: Submitter, once: OnlyOnce, bell: Bell) -> Response:
    """Queue a paused job; it goes on from its last checkpoint."""
    return _steer(job_id, principal, once, bell, lambda session: job_rows.resume_job(session, job_id))


@router.post("/jobs/{job_id}/retry", response_model=Job, responses=problems(401, 403, 404, 409))
def retry_job(job_id: JobId, principal: Submitter, once: OnlyOnce, bell: Bell) -> Response:
    """Queue a failed or cancelled job again: a new attempt of the same job."""
    return _steer(job_id, principal, once, bell, lambda session: job_rows.retry_job(session, job_id))


@router.patch("/jobs/{job_id}", response_model=Job, responses=problems(401, 403, 404, 422))
def update_job(job_id: JobId, changes: JobPatch, database: Db, principal: Submitter) -> Any:
    """Change name, tags or priority; what is left out stays."""
    with database.write() as session:
        visible_job(session, job_id, principal)
        job = job_rows.update_job(session, job_id, **changes.model_dump(exclude_unset=True))
        session.flush()
        return JSONResponse(job_json(job))


@router.delete("/jobs/{job_id}", status_code=204, responses=problems(401, 403, 404, 409))
def delete_job(job_id: JobId, database: Db, principal: Submitter) -> None:
    """Hide a finished job and its run."""
    with database.write() as session:
        visible_job(session, job_id, principal)
        job_rows.delete_job(session, job_id)


@router.get(
    "/jobs/{job_id}/events",
    response_model=Page[Event],
    responses={200: {"content": {"text/event-stream": {}}}, **problems(400, 401, 404)},
)
async def read_events(
    request: Request,
    job_id: JobId,
    database: Db,
    events: Events,
    principal: Reader,
    after: Seq = 0,
    limit: Limit = DEFAULT_LIMIT,
    cursor: Cursor = None,
) -> Any:
    """A page of events in order; with `Accept: text/event-stream` a live stream from `Last-Event-ID` on."""
    if accepts(request, "text/event-stream"):
        last = request.headers.get("last-event-id", "")
        await run_in_threadpool(_check_visible, database, job_id, principal)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "Vary": "Accept"}
        stream = events.stream(job_id, _parse_seq(last, "/header/Last-Event-ID") if last else after)
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
    start = _parse_seq(cursor, "/query/cursor") if cursor else after
    return await run_in_threadpool(_event_page, database, job_id, principal, start, limit)


@router.get(
    "/jobs/{job_id}/logs",
    responses={200: {"content": {"text/plain": {}}}, 206: {"description": "A range"}, **problems(401, 404, 416)},
)
def read_log(request: Request, job_id: JobId, database: Db, principal: Reader) -> Response:
    """The child's log as text; `Range: bytes=...` reads a part, `bytes=-N` the end."""
    with database.read() as session:
        visible_job(session, job_id, principal)
        size = log_rows.log_size(session, job_id)
        part = parse_range(request.headers.get("range"), size)
        start, end = part or (0, min(size, 16 * _LOG_CHUNK))
        content = log_rows.read_log(session, job_id, start, end)
    headers = {"Accept-Ranges": "bytes", "Cache-Control": "no-store"}
    if part:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return Response(content, 206 if part else 200, headers, media_type="text/plain; charset=utf-8")


def visible_job(session: Any, job_id: str, principal: Principal) -> Any:
    """The job, if the caller may see it; else NotFoundError."""
    job = job_rows.get_job(session, job_id)
    principal.check_sees(job.owner, f"job {job_id}")
    return job


def _steer(job_id: str, principal: Principal, once: OnlyOnce, bell: Bell, action: Any) -> Response:
    def effect(session: Any) -> Answer:
        visible_job(session, job_id, principal)
        job = action(session)
        session.flush()
        return Answer(200, job_json(job))

    answer = once.run(effect)
    if answer.body["status"] == "queued":
        bell.ring(job_id)
    return answer.response()


def _check_visible(database: Db, job_id: str, principal: Principal) -> None:
    with database.read() as session:
        visible_job(session, job_id, principal)


def _event_page(database: Db, job_id: str, principal: Principal, after: int, limit: int) -> Response:
    with database.read() as session:
        visible_job(session, job_id, principal)
        rows = list(event_rows.list_events(session, job_id, after_seq=after, limit=limit + 1))
        page = rows[:limit]
        following = str(page[-1].seq) if len(rows) > limit else None
        return JSONResponse(page_json(page, following, event_json), headers={"Vary": "Accept"})


def _parse_seq(text: str, pointer: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 18:
        raise SpecError(
            f"{text!r} is not a place in the event history", pointer=pointer, mend=_SEQ_MEND, code="invalid_cursor"
        )
    return int(text)
