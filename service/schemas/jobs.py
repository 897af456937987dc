"""Jobs, their events, and estimates."""

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

JobKindName = Literal["train", "evaluate", "entropy", "perturbation", "branch"]


class Progress(BaseModel):
    """How far a job is; a training adds reward, entropy, tokens_per_second and eta_seconds."""

    model_config = {"extra": "allow"}

    phase: str
    done: int
    total: int


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str | None = None
    log_tail: str | None = Field(None, description="The end of the child's log.")


class Job(BaseModel):
    """An order to compute."""

    id: str
    run_id: str = Field(description="What metrics, traces and results are read by.")
    run_ids: list[str] = Field(description="All of them: an evaluation of several checkpoints has one for each.")
    kind: JobKindName
    name: str | None
    tags: list[str]
    priority: int
    status: str = Field(
        description="queued, starting, running, pausing, paused, cancelling, cancelled, succeeded or failed."
    )
    status_reason: str | None = Field(
        description="oom, worker_lost, timeout, user_request, nonfinite_loss, preflight_failed, ..."
    )
    desired_status: str | None = Field(description="What the user has asked for.")
    is_terminal: bool
    attempt: int
    progress: Progress | None
    error: JobError | None
    created_at: datetime
    queued_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    stalled: bool = Field(description="Its lease has run out and no worker is alive.")
    depends_on: list[str] = []
    links: dict[str, str]


class Event(BaseModel):
    """Something that happened to a job; the same envelope in lists and streams."""

    id: str
    seq: int = Field(description="Per job, without gaps; the stream's `id:`.")
    type: str
    level: str
    created_at: datetime
    job_id: str
    run_id: str | None
    attempt: int | None
    message: str
    data: dict[str, Any]


class Estimate(BaseModel):
    """What an order would do: rough, and nothing is queued."""

    valid: bool = True
    kind: JobKindName
    spec: dict[str, Any]
    estimate: dict[str, int | float | None]
    depends_on: list[str] = []


class JobPatch(BaseModel):
    """What may change after submission."""

    model_config = {"extra": "forbid"}

    name: Annotated[str, Field(max_length=200, pattern=r"^[^\x00]*$")] | None = None
    tags: list[Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\x00]*$")]] | None = Field(
        None, max_length=32
    )
    priority: int | None = Field(None, ge=-9, le=9)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("tags", "priority"):
            if name in self.model_fields_set and getattr(self, name) is None:
                raise ValueError(f"{name}: null is no value; leave it out to keep what there is")
        return self


class CancelRequest(BaseModel):
    """How to cancel."""

    model_config = {"extra": "forbid"}

    mode: Literal["checkpoint", "now"] = Field("checkpoint", description="Write a checkpoint first, or not.")
