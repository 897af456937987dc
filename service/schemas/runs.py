"""Runs and what they leave: metrics, answers, checkpoints, traces."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field

from service.schemas.jobs import Job, JobKindName


class Summary(BaseModel):
    """One metric over the whole run."""

    last: float | None
    min: float | None
    max: float | None
    steps: int


class Run(BaseModel):
    """What a job computes; survives pause, resume and retry."""

    id: str
    job_id: str | None
    kind: JobKindName
    spec: dict[str, Any]
    resolved: dict[str, Any] | None = Field(description="What the names of the spec turned out to be.")
    result: dict[str, Any] | None
    summary: dict[str, Summary]
    created_at: datetime
    status: str
    links: dict[str, str]


class RunDetail(Run):
    """A run with its job."""

    job: Job | None
    num_sequences: int = Field(description="Sequences with token traces.")


class Series(BaseModel):
    """One metric, column by column. With fewer points than steps, spikes stay in `min` and `max`."""

    step: list[int]
    value: list[float | None]
    min: list[float | None]
    max: list[float | None]
    smoothed: list[float | None] | None = None
    total_points: int
    downsampled: bool


class Metrics(BaseModel):
    """The metric series of a run."""

    run_id: str
    status: str
    series: dict[str, Series]


class Completion(BaseModel):
    """A sampled answer."""

    model_config = {"extra": "allow"}

    step: int
    prompt_id: str
    group: int | None
    sample: int
    prompt: str
    completion: str
    reward: float | None


class Checkpoint(BaseModel):
    """Saved weights (safetensors)."""

    id: str
    step: int
    files: list[dict[str, Any]]
    data: dict[str, Any]
    created_at: datetime
    links: dict[str, str]


class Sequence(BaseModel):
    """A sequence with a token trace."""

    n: int
    id: str
    step: int
    prompt_id: str | None
    group: int | None
    sample: int | None
    prompt: str | None
    completion: str | None
    num_tokens: int
    reward: float | None
    verdict: str | None = Field(description="On the answer, where the right one is known: `right`, `wrong`, ...")
    advantage: float | None
    stats: dict[str, float | None]
    group_stats: dict[str, Any]
    exact: bool = Field(description="False: entropies are only known to lie between `entropy_low` and `entropy_high`.")


class Alternative(BaseModel):
    """What the model might have said instead."""

    token: str | None = None
    token_id: int | None
    logp: float | None


class Pivot(BaseModel):
    """A Critical Decision Pivot."""

    model_config = {"extra": "allow"}

    position: int
    entropy: float | None = Field(description="null where it is not exact: `entropy_low` says what it is at least.")
    logp: float | None
    token: str | None
    alternatives: list[Alternative]


class Tokens(BaseModel):
    """Tokens `start` to `end` of a sequence, and per-token channels."""

    n: int
    start: int
    end: int
    tokens: list[str]
    token_ids: list[int] | None
    channels: dict[str, list[float | None]]
    pivots: list[Pivot]
    group_stats: dict[str, Any]
    exact: bool


class Pivots(BaseModel):
    """The pivots of highest entropy of a run."""

    data: list[Pivot]


class Word(BaseModel):
    """A token that pivots are."""

    token: str
    count: int
    share: float = Field(description="Of all pivots.")
    mean_entropy: float | None = Field(description="null where it is not exact: `mean_entropy_low` is a lower bound.")
    max_entropy: float | None
    mean_progress: float = Field(description="Mean place in the answer, 0 at its beginning.")


class Words(BaseModel):
    """The most frequent pivots."""

    data: list[Word]


class Histogram(BaseModel):
    """Token counts by entropy over the whole run."""

    counts: list[int]
    edges: list[float | None] = Field(description="In nats, one more than `counts`; null: no upper end.")
    num_sequences: int
    num_tokens: int = Field(description="The sum of `counts`.")
