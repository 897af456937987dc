"""Token traces: of analyses under ``/analyze/entropy``, of training steps under ``/runs``. One implementation."""

from heapq import nsmallest
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import JSONResponse

from service.auth import Principal, Reader
from service.db import traces as trace_rows
from service.deps import Db
from service.detection import Detector, detected, stored, word_statistics
from service.negotiation import accepts
from service.pagination import DEFAULT_LIMIT, Cursor, Limit, page_json
from service.schemas.common import Page, problems
from service.schemas.runs import Histogram, Pivots, Sequence, Tokens, Words
from service.traceview import (
    bounds,
    histogram_json,
    is_exact,
    lower_bounds,
    pivot_json,
    read_columns,
    sequence_json,
    tokens_json,
)
from service.visibility import RunId, visible_run

training = APIRouter(tags=["traces"])
analyses = APIRouter(tags=["analyze"])

SequenceNumber = Annotated[int, Path(ge=0, le=2**31 - 1, description="`n` of the sequence.")]
Step = Annotated[int | None, Query(ge=0, le=2**31 - 1)]
Position = Annotated[int, Query(ge=0, le=2**31 - 1, description="First token.")]
Stop = Annotated[int | None, Query(ge=0, le=2**31 - 1, description="One after the last token.")]
Channels = Annotated[
    str | None, Query(max_length=400, description="Names, separated by commas; all channels if absent.")
]
Top = Annotated[int, Query(ge=1, le=1000)]
OCTETS = "application/octet-stream"
_TOKENS: dict[int | str, dict[str, Any]] = {200: {"content": {OCTETS: {}}}, **problems(401, 404, 422)}


def _sequences(kind: str | None, run_id: str, database: Db, principal: Principal, step, cursor, limit) -> Response:
    with database.read() as session:
        run = visible_run(session, run_id, principal, kind)
        page = trace_rows.list_sequences(session, run.id, step=step, cursor=cursor, limit=limit)
        return JSONResponse(page_json(page.rows, page.next_cursor, sequence_json))


def _tokens(kind: str | None, request: Request, run_id: str, n: int, database: Db, principal, channels, start, end):
    names = [name.strip() for name in channels.split(",") if name.strip()] if channels else None
    with database.read() as session:
        run = visible_run(session, run_id, principal, kind)
        row = trace_rows.get_sequence(session, run.id, n)
        if not accepts(request, OCTETS):
            return JSONResponse(tokens_json(session, row, names, start, end), headers={"Vary": "Accept"})
        start, end = bounds(row, start, end)
        columns = read_columns(session, row, names, start, end)
    chosen = names or [name for name in columns if name != "token_ids"]
    content = b"".join(columns[name].astype("<f4").tobytes() for name in chosen)
    headers = {"X-Channels": ",".join(chosen), "X-Tokens": f"{start}-{end}", "Vary": "Accept"}
    return Response(content, headers=headers, media_type=OCTETS)


def _pivots(
    kind: str | None, run_id: str, database: Db, principal: Principal, top: int, detector: Detector = None
) -> Response:
    with database.read() as session:
        run = visible_run(session, run_id, principal, kind)
        if detector is not None:
            found = nsmallest(top, detected(session, run, detector), key=_by_entropy)
        else:
            found = [pivot_json(row) for row in trace_rows.top_pivots(session, run.id, top)]
        return JSONResponse({"data": found if is_exact(run) else lower_bounds(found, "entropy")})


def _by_entropy(pivot: dict[str, Any]) -> tuple:
    return -pivot["entropy"], pivot["n"], pivot["position"]


def _histogram(kind: str | None, run_id: str, database: Db, principal: Principal) -> Response:
    with database.read() as session:
        run = visible_run(session, run_id, principal, kind)
        counts = trace_rows.histogram(session, run.id)
        return JSONResponse(histogram_json(counts, run.num_sequences))


@training.get("/runs/{run_id}/traces", response_model=Page[Sequence], responses=problems(400, 401, 404))
def list_traces(
    run_id: RunId,
    database: Db,
    principal: Reader,
    step: Step = None,
    cursor: Cursor = None,
    limit: Limit = DEFAULT_LIMIT,
) -> Any:
    """Sequences with token traces, by step."""
    return _sequences(None, run_id, database, principal, step, cursor, limit)


@training.get("/runs/{run_id}/traces/{n}/tokens", response_model=Tokens, responses=_TOKENS)
def trace_tokens(
    request: Request,
    run_id: RunId,
    n: SequenceNumber,
    database: Db,
    principal: Reader,
    channels: Channels = None,
    start: Position = 0,
    end: Stop = None,
) -> Any:
    """Tokens and per-token channels; with `Accept: application/octet-stream` the channels as little-endian float32."""
    return _tokens(None, request, run_id, n, database, principal, channels, start, end)


@training.get("/runs/{run_id}/cdps", response_model=Pivots, responses=problems(401, 404))
def trace_pivots(run_id: RunId, database: Db, principal: Reader, top: Top = 100) -> Any:
    """The Critical Decision Pivots of highest entropy among the run's traces."""
    return _pivots(None, run_id, database, principal, top)


@training.get("/runs/{run_id}/histogram", response_model=Histogram, responses=problems(401, 404))
def trace_histogram(run_id: RunId, database: Db, principal: Reader) -> Any:
    """Token counts by entropy over the run's traces."""
    return _histogram(None, run_id, database, principal)


@analyses.get("/analyze/entropy/{run_id}/sequences", response_model=Page[Sequence], responses=problems(400, 401, 404))
def list_sequences(
    run_id: RunId, database: Db, principal: Reader, cursor: Cursor = None, limit: Limit = DEFAULT_LIMIT
) -> Any:
    """The sequences of an analysis."""
    return _sequences("entropy", run_id, database, principal, None, cursor, limit)


@analyses.get("/analyze/entropy/{run_id}/sequences/{n}/tokens", response_model=Tokens, responses=_TOKENS)
def sequence_tokens(
    request: Request,
    run_id: RunId,
    n: SequenceNumber,
    database: Db,
    principal: Reader,
    channels: Channels = None,
    start: Position = 0,
    end: Stop = None,
) -> Any:
    """Tokens and per-token channels; with `Accept: application/octet-stream` the channels as little-endian float32."""
    return _tokens("entropy", request, run_id, n, database, principal, channels, start, end)


@analyses.get("/analyze/entropy/{run_id}/cdps", response_model=Pivots, responses=problems(401, 404, 422))
def analysis_pivots(run_id: RunId, database: Db, principal: Reader, detector: Detector, top: Top = 100) -> Any:
    """The Critical Decision Pivots of highest entropy: those stored, or found anew with another `detector`."""
    return _pivots("entropy", run_id, database, principal, top, detector)


@analyses.get("/analyze/entropy/{run_id}/words", response_model=Words, responses=problems(401, 404, 422))
def analysis_words(run_id: RunId, database: Db, principal: Reader, detector: Detector, top: Top = 100) -> Any:
    """Which tokens the pivots are: how often, how uncertain, where in their answers."""
    with database.read() as session:
        run = visible_run(session, run_id, principal, "entropy")
        pivots = stored(session, run) if detector is None else detected(session, run, detector)
        words = word_statistics(pivots, top)
        exact = is_exact(run)
        return JSONResponse({"data": words if exact else lower_bounds(words, "mean_entropy", "max_entropy")})


@analyses.get("/analyze/entropy/{run_id}/histogram", response_model=Histogram, responses=problems(401, 404))
def analysis_histogram(run_id: RunId, database: Db, principal: Reader) -> Any:
    """Token counts by entropy."""
    return _histogram("entropy", run_id, database, principal)
