"""The pages. They hold no data: each is a frame whose script reads the JSON API, so that both tell the same.

A page shares its address with a JSON document (``/runs/{id}``). Its route exists only for requests whose Accept names
``text/html``; all others fall through to the API's route of the same path.
"""

import re
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from jinja2 import Environment, FileSystemLoader, select_autoescape
from starlette.routing import Match

from service.negotiation import wants_html

_HOME = Path(__file__).parent.parent / "dashboard"
# The security headers, CSP among them, are put on every answer by :mod:`service.guard`.
_HEADERS = {"Cache-Control": "no-cache", "Vary": "Accept"}
templates = Environment(loader=FileSystemLoader(_HOME / "templates"), autoescape=select_autoescape())


_RUN_ID = r"^[a-z]+_[0-9a-f]{32}$"


class PageRoute(APIRoute):
    """A route that matches browsers only, and no literal path where an id is meant (``/evaluations/report``)."""

    def matches(self, scope):
        if scope["type"] == "http" and not wants_html(Request(scope)):
            return Match.NONE, {}
        match, found = super().matches(scope)
        run_id = found.get("path_params", {}).get("run_id")
        return (match, found) if run_id is None or re.match(_RUN_ID, run_id) else (Match.NONE, {})


router = APIRouter(route_class=PageRoute, include_in_schema=False, default_response_class=HTMLResponse)
RunId = Annotated[str, PathParameter(pattern=_RUN_ID)]


def add_dashboard(app: FastAPI) -> None:
    """Put the pages and their files into the application. To be called before the API's routers are included."""
    app.mount("/static", StaticFiles(directory=_HOME / "static"), name="static")
    app.include_router(router)


@router.get("/")
def home() -> Response:
    """Jobs and runs, live."""
    return _page("home.html", title="Jobs", module="home.js")


@router.get("/runs/{run_id}")
def run(run_id: RunId) -> Response:
    """One run: progress, curves, configuration, answers, checkpoints, events."""
    return _page("run.html", title="Run", module="run.js", run_id=run_id)


@router.get("/evaluations/compare")
def comparison() -> Response:
    """Evaluations of several models, problem by problem."""
    return _page("comparison.html", title="Compare evaluations", module="comparison.js")


@router.get("/evaluations/{run_id}")
def evaluation(run_id: RunId) -> Response:
    """One evaluation: numbers with their intervals, every problem, every answer with its verdict."""
    return _page("evaluation.html", title="Evaluation", module="evaluation.js", run_id=run_id)


@router.get("/analyze/entropy/{run_id}")
def entropy(run_id: RunId) -> Response:
    """The answers of an analysis, coloured by token."""
    return _page("tokens.html", title="Entropy", module="tokens.js", run_id=run_id, source="analysis")


@router.get("/analyze/perturbation/{run_id}")
def perturbation(run_id: RunId) -> Response:
    """Accuracy by arm, and the contrasts."""
    return _page("perturbation.html", title="Perturbation", module="perturbation.js", run_id=run_id)


@router.get("/analyze/branch/{run_id}")
def branch(run_id: RunId) -> Response:
    """What else could have stood at one place, and where it leads."""
    return _page("branch.html", title="Branches", module="branch.js", run_id=run_id)


@router.get("/runs/{run_id}/traces/{number}")
def trace(run_id: RunId, number: int) -> Response:
    """The credit microscope: one traced answer of a training step."""
    return _page(
        "tokens.html", title="Credit microscope", module="tokens.js", run_id=run_id, source="run", number=number
    )


def _page(template: str, **values: object) -> Response:
    return HTMLResponse(templates.get_template(template).render(values), headers=_HEADERS)
