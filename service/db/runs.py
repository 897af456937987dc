"""Runs and what they leave: completions, checkpoints, the answers of evaluations."""

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.db.jobs import get_run, has_tag
from service.db.measured import Checkpoint, Completion
from service.db.models import Job, Run
from service.db.paging import Page, read_page
from service.db.types import clamp

__all__ = [
    "answers_to_analyse",
    "bases_of_trainings",
    "find_checkpoint",
    "get_run",
    "list_checkpoints",
    "list_completions",
    "list_items",
    "list_runs",
    "loaded_base",
    "size_of_answers",
    "stored_answers",
]

_ANSWER = (
    "prompt_id",
    "sample",
    "completion",
    "gold",
    "verdict",
    "boxed",
    "truncated",
    "num_tokens",
    "level",
    "subject",
)


def list_runs(
    s: Session,
    *,
    kind: str | None = None,
    target: str | None = None,
    owner: str | None = None,
    status: str | None = None,
    tag: str | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> Page:
    """Runs, newest first. ``target``: those that work on a checkpoint of this run."""
    query = select(Run).join(Job, Job.id == Run.job_id).where(Run.deleted_at.is_(None))
    for column, value in ((Run.kind, kind), (Run.target, target), (Job.owner, owner), (Job.status, status)):
        if value is not None:
            query = query.where(column == value)
    if tag is not None:
        query = query.where(has_tag(tag))
    return read_page(s, query, Run.id, cursor=cursor, limit=limit)


def list_completions(
    s: Session,
    run_id: str,
    *,
    step: int | None = None,
    step_min: int | None = None,
    step_max: int | None = None,
    verdict: str | None = None,
    prompt_id: str | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> Page:
    """Sampled answers in the order in which they were stored."""
    query = select(Completion).where(Completion.run_id == run_id)
    if step is not None:
        query = query.where(Completion.step == clamp(step))
    if step_min is not None:
        query = query.where(Completion.step >= clamp(step_min))
    if step_max is not None:
        query = query.where(Completion.step <= clamp(step_max))
    if verdict is not None:
        query = query.where(Completion.verdict == verdict)
    if prompt_id is not None:
        query = query.where(Completion.prompt_id == prompt_id)
    return read_page(s, query, Completion.id, cursor=cursor, limit=limit, newest_first=False)


def list_items(
    s: Session,
    run_id: str,
    *,
    verdict: str | None = None,
    prompt_id: str | None = None,
    cursor: str | None = None,
    limit: int = 50,
) -> Page:
    """Answers of an evaluation."""
    return list_completions(s, run_id, verdict=verdict, prompt_id=prompt_id, cursor=cursor, limit=limit)


def stored_answers(s: Session, run_id: str, *, with_prompt: bool = False) -> list[dict[str, Any]]:
    """Every stored answer of an evaluation, with its problem's text and place only if asked for."""
    names = _ANSWER + (("prompt", "group") if with_prompt else ())
    query = select(*(getattr(Completion, name) for name in names)).where(Completion.run_id == run_id)
    return [dict(zip(names, row, strict=True)) for row in s.execute(query)]


def answers_to_analyse(s: Session, run_id: str, *, step: int | None, limit: int) -> list[dict[str, Any]]:
    """The first stored answers of a run, with their problems and right answers."""
    page = list_completions(s, run_id, step=step, limit=limit)
    return [{"prompt": row.prompt, "completion": row.completion, "gold": row.gold} for row in page.rows]


def size_of_answers(s: Session, run_id: str, *, step: int | None, limit: int) -> tuple[int, int]:
    """How many answers :func:`answers_to_analyse` finds, and their tokens."""
    rows = list_completions(s, run_id, step=step, limit=limit).rows
    return len(rows), sum(row.num_tokens for row in rows)


def find_checkpoint(s: Session, run_id: str, wanted: str | int) -> Checkpoint | None:
    """The checkpoint ``last``, ``best`` or that of a step, if there is one.

    ``best``: of highest reward, the earliest of equals, as rotation on disk has it; the last where none has a reward.
    """
    found = list_checkpoints(s, run_id)
    if isinstance(wanted, int):
        found = [row for row in found if row.step == wanted]
    elif wanted == "best":
        rewarded = [row for row in found if row.data.get("reward") is not None]
        found = [max(rewarded, key=lambda row: row.data["reward"])] if rewarded else found
    return found[-1] if found else None


def list_checkpoints(s: Session, run_id: str) -> list[Checkpoint]:
    """Checkpoints, oldest step first."""
    return list(
        s.scalars(select(Checkpoint).where(Checkpoint.run_id == run_id).order_by(Checkpoint.step).limit(10_000))
    )


def loaded_base(run: Run) -> str | None:
    """The base model that an attempt of the run has reported: a name, that of a hub with its commit, or the folder of a
    checkpoint of every weight. None where no attempt has come that far."""
    found = run.resolved or {}
    return found.get("model", found).get("base")


def bases_of_trainings(s: Session, run_id: str) -> set[str]:
    """Folders of a run's checkpoints that trainings have begun from, deleted ones as well: adapters lie on them."""
    begun = s.scalars(select(Run).where(Run.target == run_id, Run.kind == "train"))
    return {base for base in map(loaded_base, begun) if base is not None}
