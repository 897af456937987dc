"""Finished evaluations as the API compares and tabulates them, and their numbers under another rule."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from erpo_core.errors import NotFoundError, SpecError
from erpo_core.evaluation_identity import model_of
from erpo_core.evaluation_summary import summarise
from erpo_core.reports import Entry
from erpo_core.specs.evaluate import EvaluateSpec
from service.auth import Principal
from service.db import jobs as job_rows
from service.db import runs as run_rows
from service.visibility import visible_run

_POINTER = "/query/evaluation"


@dataclass(frozen=True)
class Finished:
    """A finished evaluation."""

    run_id: str
    label: str
    spec: EvaluateSpec
    parts: dict[str, Any]
    result: dict[str, Any]

    @property
    def benchmark(self) -> str:
        """The data set's name in the request, and how many of its problems where that was limited."""
        return self.spec.dataset + (f" (first {self.spec.limit})" if self.spec.limit else "")

    def entry(self) -> Entry:
        """As a row of a report needs it."""
        return Entry(self.run_id, model_of(self.parts), self.label, self.benchmark, self.result)


def finished(session: Session, run_ids: list[str], principal: Principal) -> list[Finished]:
    """The evaluations that a query names, in its order.

    Raises:
        SpecError: one is named twice, does not exist for this caller, is of another kind, or has no result (yet).
    """
    if len(set(run_ids)) < len(run_ids):
        raise SpecError("an evaluation is named twice", pointer=_POINTER, mend="name each once")
    return [_finished(session, run_id, principal) for run_id in run_ids]


def _finished(session: Session, run_id: str, principal: Principal) -> Finished:
    try:
        run = visible_run(session, run_id, principal, "evaluate")
    except NotFoundError as error:
        raise SpecError(
            error.message,
            pointer=_POINTER,
            mend="name runs that GET /runs?kind=evaluate lists",
            code="unknown_reference",
        ) from None
    if run.result is None or run.resolved is None:
        status = job_rows.get_job(session, run.job_id).status
        raise SpecError(
            f"evaluation {run_id} has no result: it is {status}", pointer=_POINTER, mend="wait until it has succeeded"
        )
    parts = (run.resolved.get("identity") or {}).get("parts")
    if parts is None:
        raise SpecError(
            f"evaluation {run_id} is from before identities were recorded", pointer=_POINTER, mend="evaluate again"
        )
    spec = EvaluateSpec.model_validate(run.spec)
    return Finished(run.id, model_label(session, run.spec["model"]), spec, parts, run.result)


def model_label(session: Session, model: str | dict[str, Any]) -> str:
    """What people call a model: its name, or the training's name and the checkpoint."""
    if isinstance(model, str):
        return model
    run_id, checkpoint = model["run"], model.get("checkpoint", "last")
    try:
        name = job_rows.get_job(session, run_rows.get_run(session, run_id).job_id).name
    except NotFoundError:
        name = None
    return f"{name or run_id} @ {checkpoint}"


def recomputed(session: Session, run: Any, *, pass_at: str | None, truncated_boxed: str | None) -> dict[str, Any]:
    """The result of an evaluation from its stored answers: other k, another rule for cut answers.

    Raises:
        SpecError: a k that is no whole number from 1 to the number of samples; no answer is stored.
    """
    spec = EvaluateSpec.model_validate(run.spec)
    changes: dict[str, Any] = {"truncated_boxed": truncated_boxed or spec.truncated_boxed}
    if pass_at is not None:
        changes["pass_at"] = _ks(pass_at, spec.num_samples)
    rows = run_rows.stored_answers(session, run.id)
    if not rows:
        raise SpecError(f"evaluation {run.id} has no answer yet", pointer="/query/pass_at", mend="wait for its answers")
    return summarise(rows, spec.model_copy(update=changes))


def _ks(text: str, num_samples: int) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 6 and 1 <= int(part) <= num_samples for part in parts):
        raise SpecError(
            f"pass_at={text} is not a list of whole numbers from 1 to {num_samples}",
            pointer="/query/pass_at",
            mend=f"write for example pass_at=1,{num_samples}; the evaluation has {num_samples} samples of each problem",
        )
    return tuple(map(int, parts))
