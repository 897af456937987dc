"""Entropy analyses: order one, look at one. Their sequences are in :mod:`service.routers.traces`."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from erpo_core.specs import EntropySpec
from service.auth import Principal, Reader
from service.deps import Db, Events
from service.idempotency import Answer
from service.runview import run_detail
from service.schemas.common import problems
from service.schemas.jobs import Estimate, Job
from service.schemas.runs import RunDetail
from service.submission import Desk
from service.visibility import RunId, visible_run

router = APIRouter(tags=["analyze"])


@router.post(
    "/analyze/entropy",
    status_code=202,
    response_model=Job,
    responses={200: {"model": RunDetail | Estimate, "description": "`wait`: it has ended; or `dry_run=true`"}}
    | problems(401, 403, 409, 422, 429),
)
async def submit_analysis(
    desk: Desk,
    spec: EntropySpec,
    database: Db,
    events: Events,
    dry_run: Annotated[bool, Query(description="Validate and estimate; queue nothing.")] = False,
    wait: Annotated[float, Query(ge=0, le=60, description="Seconds to wait for the result.")] = 0,
) -> Response:
    """Measure per-token entropy of given texts, or of answers sampled to prompts."""
    if dry_run:
        return (await run_in_threadpool(desk.estimate, "entropy", spec)).response()
    answer: Answer = await run_in_threadpool(desk.submit, "entropy", spec)
    if wait and await events.wait_until_terminal(answer.body["id"], wait):
        detail = await run_in_threadpool(_read, database, answer.body["run_id"], desk.principal)
        return JSONResponse(detail, headers=answer.headers)
    return answer.response()


@router.get("/analyze/entropy/{run_id}", response_model=RunDetail, responses=problems(401, 404))
def get_analysis(run_id: RunId, database: Db, principal: Reader) -> Any:
    """One analysis; with `Accept: text/html` its page."""
    return JSONResponse(_read(database, run_id, principal), headers={"Vary": "Accept"})


def _read(database: Db, run_id: str, principal: Principal) -> dict[str, Any]:
    with database.read() as session:
        return run_detail(session, visible_run(session, run_id, principal, "entropy"))
