"""Analyses: order one, look at one. Sequences of an entropy analysis are in :mod:`service.routers.traces`."""

import csv
import io
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from erpo_core.specs import BranchSpec, EntropySpec, JobKind, PerturbationSpec
from erpo_core.specs.perturbation import OUTCOMES_STEP
from service.auth import Principal, Reader
from service.db import runs as run_rows
from service.deps import Db, Events
from service.idempotency import Answer
from service.pagination import DEFAULT_LIMIT, MAX_LIMIT, Cursor, Limit, page_json
from service.runview import run_detail
from service.schemas.common import Page, problems
from service.schemas.jobs import Estimate, Job
from service.schemas.runs import Completion, RunDetail
from service.shape import completion_json
from service.submission import Desk
from service.visibility import RunId, visible_run

router = APIRouter(tags=["analyze"])

DryRun = Annotated[bool, Query(description="Validate and estimate; queue nothing.")]
Wait = Annotated[float, Query(ge=0, le=60, description="Seconds to wait for the result.")]
_ORDER: dict[str, Any] = {
    "status_code": 202,
    "response_model": Job,
    "responses": {200: {"model": RunDetail | Estimate, "description": "`wait`: it has ended; or `dry_run=true`"}}
    | problems(401, 403, 409, 422, 429),
}
_COLUMNS = ("problem", "arm", "place", "edit", "sample", "right", "verdict", "truncated", "num_tokens", "completion")


@router.post("/analyze/entropy", **_ORDER)
async def submit_analysis(
    desk: Desk, spec: EntropySpec, database: Db, events: Events, dry_run: DryRun = False, wait: Wait = 0
) -> Response:
    """Measure per-token entropy of given texts, of stored answers, or of answers sampled to prompts or a benchmark."""
    return await _order("entropy", desk, spec, database, events, dry_run, wait)


@router.post("/analyze/perturbation", **_ORDER)
async def submit_perturbation(
    desk: Desk, spec: PerturbationSpec, database: Db, events: Events, dry_run: DryRun = False, wait: Wait = 0
) -> Response:
    """Disturb right answers at tokens of high and of low entropy, continue them, compare how often they stay right."""
    return await _order("perturbation", desk, spec, database, events, dry_run, wait)


@router.post("/analyze/branch", **_ORDER)
async def submit_branch(
    desk: Desk, spec: BranchSpec, database: Db, events: Events, dry_run: DryRun = False, wait: Wait = 0
) -> Response:
    """From one token of a stored sequence: the likeliest alternatives, continued, with the share that ends right."""
    return await _order("branch", desk, spec, database, events, dry_run, wait)


@router.get("/analyze/entropy/{run_id}", response_model=RunDetail, responses=problems(401, 404))
def get_analysis(run_id: RunId, database: Db, principal: Reader) -> Any:
    """One analysis; with `Accept: text/html` its page."""
    return JSONResponse(_read(database, run_id, principal, "entropy"), headers={"Vary": "Accept"})


@router.get("/analyze/perturbation/{run_id}", response_model=RunDetail, responses=problems(401, 404))
def get_perturbation(run_id: RunId, database: Db, principal: Reader) -> Any:
    """One perturbation: `result` holds arms and contrasts; with `Accept: text/html` its page."""
    return JSONResponse(_read(database, run_id, principal, "perturbation"), headers={"Vary": "Accept"})


@router.get("/analyze/branch/{run_id}", response_model=RunDetail, responses=problems(401, 404))
def get_branch(run_id: RunId, database: Db, principal: Reader) -> Any:
    """One tree of branches: `result` holds the alternatives and their success; with `Accept: text/html` its page."""
    return JSONResponse(_read(database, run_id, principal, "branch"), headers={"Vary": "Accept"})


@router.get(
    "/analyze/perturbation/{run_id}/outcomes", response_model=Page[Completion], responses=problems(400, 401, 404)
)
def list_outcomes(
    run_id: RunId, database: Db, principal: Reader, cursor: Cursor = None, limit: Limit = DEFAULT_LIMIT
) -> Any:
    """Every continuation; `prompt_id` is `problem/arm/place/written token id>replacing token id`.

    The answers that showed which problems are solved are at `/runs/{id}/completions?step=1`.
    """
    return _answers("perturbation", run_id, database, principal, cursor, limit)


@router.get("/analyze/branch/{run_id}/outcomes", response_model=Page[Completion], responses=problems(400, 401, 404))
def list_branches(
    run_id: RunId, database: Db, principal: Reader, cursor: Cursor = None, limit: Limit = DEFAULT_LIMIT
) -> Any:
    """Every continuation; `prompt_id` is `position/token id`."""
    return _answers("branch", run_id, database, principal, cursor, limit)


@router.get(
    "/analyze/perturbation/{run_id}/outcomes.csv",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/csv": {}}}, **problems(401, 404)},
)
def outcomes_csv(run_id: RunId, database: Db, principal: Reader) -> StreamingResponse:
    """All outcomes as one table."""
    with database.read() as session:
        run = visible_run(session, run_id, principal, "perturbation")
    headers = {"Content-Disposition": f'attachment; filename="{run.id}.csv"'}
    return StreamingResponse(_csv(database, run.id), media_type="text/csv; charset=utf-8", headers=headers)


async def _order(
    kind: JobKind, desk: Desk, spec: Any, database: Db, events: Events, dry_run: bool, wait: float
) -> Response:
    if dry_run:
        return (await run_in_threadpool(desk.estimate, kind, spec)).response()
    answer: Answer = await run_in_threadpool(desk.submit, kind, spec)
    if wait and await events.wait_until_terminal(answer.body["id"], wait):
        detail = await run_in_threadpool(_read, database, answer.body["run_id"], desk.principal, kind)
        return JSONResponse(detail, headers=answer.headers)
    return answer.response()


def _read(database: Db, run_id: str, principal: Principal, kind: JobKind) -> dict[str, Any]:
    with database.read() as session:
        return run_detail(session, visible_run(session, run_id, principal, kind))


def _answers(kind: JobKind, run_id: str, database: Db, principal: Principal, cursor, limit) -> Response:
    with database.read() as session:
        run = visible_run(session, run_id, principal, kind)
        page = run_rows.list_completions(session, run.id, step=OUTCOMES_STEP, cursor=cursor, limit=limit)
        return JSONResponse(page_json(page.rows, page.next_cursor, completion_json))


def _csv(database: Db, run_id: str) -> Iterator[str]:
    """The table, page by page: no connection is held while a slow reader reads."""
    yield _lines([_COLUMNS])
    cursor = None
    while True:
        with database.read() as session:
            page = run_rows.list_completions(session, run_id, step=OUTCOMES_STEP, cursor=cursor, limit=MAX_LIMIT)
            rows = [_outcome(row) for row in page.rows]
        yield _lines(rows)
        if (cursor := page.next_cursor) is None:
            return


def _outcome(row: Any) -> tuple:
    facts = (row.sample, row.reward, row.verdict, row.truncated, row.num_tokens, row.completion)
    return (*row.prompt_id.split("/", 3), *facts)


def _lines(rows: list) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()
