"""Evaluations: the numbers, and every answer behind them."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse

from service.auth import Reader
from service.db import runs as run_rows
from service.deps import Db
from service.pagination import DEFAULT_LIMIT, Cursor, Limit, page_json
from service.runview import run_detail, run_summary_json
from service.schemas.common import Page, problems
from service.schemas.runs import Completion, Run, RunDetail
from service.shape import completion_json
from service.visibility import RunId, visible_run

router = APIRouter(tags=["evaluations"])


@router.get("/evaluations/{run_id}", response_model=RunDetail, responses=problems(401, 404))
def get_evaluation(run_id: RunId, database: Db, principal: Reader) -> Any:
    """One evaluation: `result` holds acc, fmt and pass@k with their intervals."""
    with database.read() as session:
        detail = run_detail(session, visible_run(session, run_id, principal, "evaluate"))
        return JSONResponse(detail, headers={"Vary": "Accept"})


@router.get("/evaluations/{run_id}/items", response_model=Page[Completion], responses=problems(400, 401, 404))
def list_items(
    run_id: RunId,
    database: Db,
    principal: Reader,
    verdict: Annotated[str | None, Query(max_length=40, description="right, wrong, unparsable, ...")] = None,
    cursor: Cursor = None,
    limit: Limit = DEFAULT_LIMIT,
) -> Any:
    """Every sampled answer with its verdict."""
    with database.read() as session:
        run = visible_run(session, run_id, principal, "evaluate")
        page = run_rows.list_items(session, run.id, verdict=verdict, cursor=cursor, limit=limit)
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
