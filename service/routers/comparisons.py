"""Several evaluations at once: compared problem by problem, and as tables for a paper."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from erpo_core.errors import SpecError
from erpo_core.evaluation_identity import differing_parts
from erpo_core.reports import PAPER, Table, accuracy_table, passk_table, to_csv, to_latex, to_markdown
from service.auth import Reader
from service.comparison import comparison_json
from service.deps import Db
from service.evaluationview import Finished, finished
from service.negotiation import accepts
from service.schemas.common import problems
from service.schemas.evaluations import Comparison, Report
from service.shape import finite

router = APIRouter(tags=["evaluations"])
Format = Literal["json", "markdown", "csv", "latex"]
_MEDIA: dict[Format, str] = {"markdown": "text/markdown", "csv": "text/csv", "latex": "application/x-latex"}
_HEADERS = {"Vary": "Accept"}


@router.get("/evaluations/compare", response_model=Comparison, responses=problems(401, 422))
def compare_evaluations(
    database: Db,
    principal: Reader,
    evaluation: Annotated[
        list[str], Query(min_length=2, max_length=32, description="Run ids; the first on a benchmark is its baseline.")
    ],
) -> Any:
    """Paired differences by problem, with 95% bootstrap intervals over problems and exact two-sided tests.

    With one sample a problem the test is McNemar's, with more the permutation test over the signs of the differences.
    `p_adjusted` is Holm's over every test of the answer. Evaluations of one benchmark may differ in the model and the
    seed alone.
    """
    with database.read() as session:
        body = comparison_json(session, finished(session, evaluation, principal))
    return JSONResponse(finite(body), headers=_HEADERS)


@router.get(
    "/evaluations/report",
    response_model=Report,
    responses={200: {"content": {media: {} for media in _MEDIA.values()}}, **problems(401, 422)},
)
def report_evaluations(
    request: Request,
    database: Db,
    principal: Reader,
    evaluation: Annotated[list[str], Query(min_length=1, max_length=64, description="Run ids.")],
    table: Annotated[
        Literal["accuracy", "pass_at"], Query(description="Acc and Fmt (Table 1 of the paper) or pass@k (Table 2).")
    ] = "accuracy",
    format: Annotated[Format | None, Query(description="Default: what Accept names, else json.")] = None,
    paper: Annotated[bool, Query(description="Put the paper's own rows beside.")] = False,
) -> Any:
    """A table with a row for each model and the benchmarks as columns, in percent."""
    with database.read() as session:
        found = finished(session, evaluation, principal)
    made = _table(found, table, paper)
    notes = _notes(found, made, paper)
    chosen = format or next((name for name, media in _MEDIA.items() if accepts(request, media)), "json")
    if chosen == "json":
        return JSONResponse(finite({"table": table, **asdict(made), "notes": notes}), headers=_HEADERS)
    text = to_csv(made) if chosen == "csv" else {"markdown": to_markdown, "latex": to_latex}[chosen](made, notes)
    return Response(text, headers=_HEADERS, media_type=f"{_MEDIA[chosen]}; charset=utf-8")


def _table(found: list[Finished], name: str, paper: bool) -> Table:
    try:
        return (accuracy_table if name == "accuracy" else passk_table)([one.entry() for one in found], paper=paper)
    except ValueError as error:
        raise SpecError(str(error), pointer="/query/evaluation", mend="name one of them") from None


def _notes(found: list[Finished], table: Table, paper: bool) -> list[str]:
    """What a reader has to know: cut answers, rows that were not measured alike, where numbers come from."""
    notes = []
    for row in table.rows:
        if any(row.truncated.values()):
            shares = ", ".join(f"{name} {100 * share:.1f}%" for name, share in row.truncated.items())
            notes.append(f"Answers of {row.label} cut at the length limit: {shares}")
    first = found[0]
    for other in found[1:]:
        names = [name for name in differing_parts(first.parts, other.parts) if name != "dataset"]
        if names:
            notes.append(f"{other.run_id} differs from {first.run_id} in {', '.join(names)}")
    return [*notes, f"Paper: {PAPER}"] if paper else notes
