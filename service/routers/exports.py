"""Entropy analyses as files."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import FileResponse, HTMLResponse
from starlette.background import BackgroundTask

from service.auth import Reader
from service.db import traces as trace_rows
from service.db.engine import Database
from service.deps import Db
from service.export import write_npz, write_parquet
from service.pagination import page_json
from service.routers.dashboard import templates
from service.runview import run_detail
from service.schemas.common import problems
from service.standalone import standalone_page
from service.traceview import is_exact, lower_bounds, pivot_json, sequence_json, tokens_json
from service.visibility import RunId, visible_run

router = APIRouter(tags=["analyze"])
PARQUET = "application/vnd.apache.parquet"
_WRITERS: dict[str, tuple[Callable[[Database, str, Path], None], str]] = {
    "parquet": (write_parquet, PARQUET),
    "npz": (write_npz, "application/zip"),
}
_PAGE_SEQUENCES = 100
_TOP_PIVOTS = 30


@router.get(
    "/analyze/entropy/{run_id}/export",
    response_class=Response,
    responses={200: {"content": {PARQUET: {}, "application/zip": {}, "text/html": {}}}} | problems(401, 404, 422, 501),
)
def export_analysis(
    run_id: RunId,
    database: Db,
    principal: Reader,
    format: Annotated[
        Literal["parquet", "npz", "html"],
        Query(description="`parquet`: a row per token. `npz`: NumPy arrays. `html`: a page that opens offline."),
    ] = "parquet",
) -> Response:
    """The whole analysis as one file; `html` holds its first 100 answers."""
    with database.read() as session:
        run = visible_run(session, run_id, principal, "entropy")
        run_id = run.id
        headers = {"Content-Disposition": f'attachment; filename="{run_id}.{format}"'}
        if format == "html":
            return HTMLResponse(standalone_page(templates, run_id, _packed(session, run)), headers=headers)
    write, media_type = _WRITERS[format]
    folder = tempfile.TemporaryDirectory(prefix="erpo-export-")
    path = Path(folder.name) / f"{run_id}.{format}"
    try:
        write(database, run_id, path)
    except BaseException:
        folder.cleanup()
        raise
    return FileResponse(path, headers=headers, media_type=media_type, background=BackgroundTask(folder.cleanup))


def _packed(session: Any, run: Any) -> dict[str, Any]:
    """What the page asks the API for, under the addresses it asks."""
    home = f"/analyze/entropy/{run.id}"
    rows = trace_rows.list_sequences(session, run.id, limit=_PAGE_SEQUENCES).rows
    known = {row.n for row in rows}
    pivots = [pivot_json(row) for row in trace_rows.top_pivots(session, run.id, _TOP_PIVOTS) if row.n in known]
    answers = {
        home: run_detail(session, run),
        f"{home}/sequences?limit={_PAGE_SEQUENCES}": page_json(rows, None, sequence_json),
        f"{home}/cdps?top={_TOP_PIVOTS}": {"data": pivots if is_exact(run) else lower_bounds(pivots, "entropy")},
    }
    for n in sorted(known):
        stored = trace_rows.get_sequence(session, run.id, n)
        answers[f"{home}/sequences/{n}/tokens"] = tokens_json(session, stored, None, 0, None)
    return answers
