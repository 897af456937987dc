"""Process settings, read from ``ERPO_*`` environment variables. What to compute never stands here."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

RING_TASK = "erpo.ring"
"""Name of the one Celery task; its argument is a job id, its meaning "look at the queue"."""


class Settings(BaseSettings):
    """Settings of one process. With none set, everything lives under ``data_dir``."""

    model_config = SettingsConfigDict(env_prefix="ERPO_", frozen=True)

    data_dir: Path = Field(Path("erpo-data"), description="Database, logs, caches and artifacts of the embedded mode.")
    database_url: str = Field("", description="SQLAlchemy URL; default: SQLite in `data_dir`.")
    broker_url: str = Field("", description="Redis-protocol URL; set by `erpo up` for the embedded server.")
    artifacts_dir: Path | None = Field(None, description="Checkpoints and uploads, shared by API and workers.")
    cache_dir: Path | None = Field(None, description="Prepared models; may be emptied at will.")
    data_root: Path | None = Field(None, description="Folder of the JSONL files that `data:<file>` names.")
    vllm_servers: tuple[str, ...] = Field((), description="Base URLs of vLLM servers that jobs may name (JSON list).")
    model_roots: tuple[Path, ...] = Field((), description="Folders below which local models may be named (JSON list).")

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    allowed_hosts: tuple[str, ...] = Field(("127.0.0.1", "localhost", "[::1]", "testserver"), description="JSON list.")
    max_body_bytes: int = Field(16 * 2**20, ge=1024)
    max_queued_jobs: int = Field(1000, ge=1)
    max_trace_bytes_per_job: int = Field(4 * 2**30, ge=1, description="Orders that may store more are refused.")

    queues: tuple[str, ...] = Field(("default",), description="Queues this worker serves (JSON list).")
    lease_seconds: float = Field(60, gt=0, description="A silent worker loses its job after this time.")
    heartbeat_seconds: float = Field(10, gt=0)
    sweep_seconds: float = Field(30, gt=0, description="How often each worker looks at the queue without being rung.")
    grace_seconds: float = Field(60, gt=0, description="From SIGTERM to SIGKILL of a child.")
    shutdown_seconds: float = Field(60, gt=0, description="The same when the worker itself is asked to leave.")
    child_command: tuple[str, ...] = Field((), description="What runs a job, if not `python -m workers.child` (JSON).")
    log_bytes_per_job: int = Field(16 * 2**20, ge=1024)

    @model_validator(mode="after")
    def _derive(self) -> Self:
        home = self.data_dir.expanduser().resolve()
        derived = {
            "data_dir": home,
            "database_url": self.database_url or f"sqlite:///{home / 'erpo.db'}",
            "artifacts_dir": (self.artifacts_dir or home / "artifacts").resolve(),
            "cache_dir": (self.cache_dir or home / "cache").resolve(),
            "data_root": (self.data_root or home / "datasets").resolve(),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        return self
