"""Registries and health."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field


class ModelEntry(BaseModel):
    """A name that may stand as `model`."""

    model_config = {"extra": "allow"}

    name: str
    description: str | None = None


class RewardEntry(BaseModel):
    """A name that may stand in `rewards`."""

    name: str
    description: str | None = Field(description="null for a reward of an installed package.")
    arguments: list[str] | None = Field(description="What `args` may hold; null where only the worker knows.")
    source: str = Field(description="`built-in`, or the package that registers it.")


class BenchmarkEntry(BaseModel):
    """A benchmark that may stand as `dataset`."""

    name: str
    num_problems: int
    license: str
    source: str
    file: str = Field(description="In the data root.")
    hub: str = Field(description="Where `erpo data fetch` gets it.")
    is_present: bool = Field(description="Whether the file is in the service's data root.")


class DatasetEntry(BaseModel):
    """A name that may stand as `dataset`."""

    id: str = Field(description="What to write as `dataset`.")
    name: str | None = None
    num_problems: int | None = None
    size_bytes: int | None = None
    sha256: str | None = None
    created_at: datetime | None = None


class Worker(BaseModel):
    """A worker process."""

    model_config = {"extra": "allow"}

    id: str
    host: str | None = None
    queues: list[str] = []
    abilities: list[str] | None = Field(
        None, description="What its jobs may use: `cuda`, `cuda:8` (so many devices), `vllm`, ...; null: not known."
    )
    last_seen_at: datetime | None = None
    current_job_id: str | None = None
    is_alive: bool


class Ready(BaseModel):
    """Whether jobs can be taken: `ready` needs the database; the rest says what else is there."""

    status: str
    checks: dict[str, Any]


class SessionRequest(BaseModel):
    """A key to be exchanged for a browser session."""

    model_config = {"extra": "forbid"}

    key: str = Field(min_length=1, max_length=200)


class SessionInfo(BaseModel):
    """Who the caller is."""

    scope: str
    owner: str | None
    auth_required: bool
