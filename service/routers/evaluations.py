"""Evaluations: the numbers, and every answer behind them."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse

from erpo_core.specs.evaluate import EvaluateSpec
from service.auth import Reader
from service.db import problems as problem_rows
from service.db import runs as run_rows
from service.deps import Db
from service.evaluationview import recomputed
from service.pagination import DEFAULT_LIMIT, Cursor, Limit, page_json
from service.runview import run_detail, run_summary_json
from service.schemas.common import Page, problems
from service.schemas.evaluations import ProblemRow
from service.schemas.jobs import Job
from service.schemas.runs import Completion, Run, RunDetail
from service.shape import completion_json, finite, problem_json
from service.submission import Desk
from service.visibility import RunId, visible_run

router = APIRouter(tags=["evaluations"])


TruncatedBoxed = Annotated[
    Literal["credit", "wrong"] | None, Query(description="Another rule for answers cut at the length limit.")
]


@router.get("/evaluations/{run_id}", response_model=RunDetail, responses=problems(401, 404, 422))
def get_evaluation(
    run_id: RunId,
    database: Db,
    principal: Reader,
    pass_at: Annotated[str | None, Query(max_length=200, description="Other k, separated by commas.")] = None,
    truncated_boxed: TruncatedBoxed = None,
) -> Any:
    """One evaluation: `result` holds acc, fmt and pass@k with their intervals.

    With `pass_at` or `truncated_boxed` it is computed anew from the stored answers, those of a running evaluation too;
    nothing is generated, and what is stored stays.
    """
    with database.read() as session:
        run = visible_run(session, run_id, principal, "evaluate")
        detail = run_detail(session, run)
        if pass_at is not None or truncated_boxed is not None:
            found = recomputed(session, run, pass_at=pass_at, truncated_boxed=truncated_boxed)
            detail["result"] = finite(found)
        return JSONResponse(detail, headers={"Vary": "Accept"})


@router.post(
    "/evaluations/{run_id}/verify",
    status_code=202,
    response_model=Job,
    responses=problems(401, 403, 404, 409, 422, 429),
)
def verify_again(run_id: RunId, database: Db, desk: Desk) -> Response:
    """Judge the stored answers again with the verifier that the workers have.

    That is an evaluation of its own, with an identity of its own; nothing is sampled, and the stored verdicts stay.
    """
    with database.read() as session:
        run = visible_run(session, run_id, desk.principal, "evaluate")
    spec = EvaluateSpec.model_validate(run.spec).model_copy(update={"answers_of": run.id})
    return desk.submit("evaluate", spec).response()


@router.get("/evaluations/{run_id}/problems", response_model=Page[ProblemRow], responses=problems(400, 401, 404))
def list_problems(
    run_id: RunId, database: Db, principal: Reader, cursor: Cursor = None, limit: Limit = DEFAULT_LIMIT
) -> Any:
    """Every problem with the counts of its answers, in the order of the data set."""
    with database.read() as session:
        run = visible_run(session, run_id, principal, "evaluate")
        rule = run.spec.get("truncated_boxed", "credit")
        page = problem_rows.list_problems(session, run.id, truncated_boxed=rule, cursor=cursor, limit=limit)
        return JSONResponse(page_json(page.rows, page.next_cursor, problem_json))


@router.get("/evaluations/{run_id}/items", response_model=Page[Completion], responses=problems(400, 401, 404))
def list_items(
    run_id: RunId,
    database: Db,
    principal: Reader,
    verdict: Annotated[str | None, Query(max_length=40, description="right, wrong, unparsable, ...")] = None,
    prompt_id: Annotated[str | None, Query(max_length=200, description="Answers to one problem.")] = None,
    cursor: Cursor = None,
    limit: Limit = DEFAULT_LIMIT,
) -> Any:
    """Every sampled answer with its verdict."""
    with database.read() as session:
        run = visible_run(session, run_id, principal, "evaluate")
        page = run_rows.list_items(session, run.id, verdict=verdict, prompt_id=prompt_id, cursor=cursor, limit=limit)
        return JSONResponse(page_json(page.rows, page.next_cursor, completion_json))


@router.get("/runs/{run_id}/evaluations", response_model=Page[Run], responses=problems(400, 401, 404))
def list_evaluations(
    run_id: RunId, database: Db, principal: Reader, cursor: Cursor = None, limit: Limit = DEFAULT_LIMIT
) -> Any:
    """Evaluations whose model is a checkpoint of this run."""
    with database.read() as session:
        run = visible_run(session, run_id, principal)
        page = run_rows.list_runs(
            session, kind="evaluate", target=run.id, owner=principal.sees_only, cursor=cursor, limit=limit
        )
        return JSONResponse(page_json(page.rows, page.next_cursor, lambda row: run_summary_json(session, row)))
