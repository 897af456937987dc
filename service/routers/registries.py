"""What may be named in a specification, and who computes."""

import hashlib
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response, UploadFile
from fastapi.responses import JSONResponse

from erpo_core.data.benchmarks import BENCHMARKS, is_present
from erpo_core.models import KNOWN_MODELS
from erpo_core.rewards.functions import known_rewards
from service.auth import Reader, Submitter
from service.db import claims as claim_rows
from service.db import datasets as dataset_rows
from service.db import overview
from service.deps import AppSettings, Db
from service.idempotency import Answer, OnlyOnce
from service.pagination import DEFAULT_LIMIT, Cursor, Limit, page_json
from service.schemas.common import Page, problems
from service.schemas.registries import BenchmarkEntry, DatasetEntry, ModelEntry, RewardEntry, Worker
from service.shape import benchmark_json, dataset_json
from service.uploads import check_upload, store_upload
from service.workerview import worker_json

router = APIRouter(tags=["registries"])


@router.get("/models", response_model=Page[ModelEntry], responses=problems(401))
def list_models(principal: Reader) -> Any:
    """Registered models. Hub ids, folders in an allowed root and checkpoints of runs may be named as well."""
    rows = [{"name": name, **entry} for name, entry in sorted(KNOWN_MODELS.items())]
    return page_json(rows, None, lambda row: {k: v for k, v in row.items() if k not in ("package", "gguf_file")})


@router.get("/rewards", response_model=Page[RewardEntry], responses=problems(401))
def list_rewards(principal: Reader) -> Any:
    """Reward functions: those of ERPO Lab, and those that packages register in the group `erpo_lab.rewards`."""
    return page_json(known_rewards(), None, lambda row: row)


@router.get("/benchmarks", response_model=Page[BenchmarkEntry], responses=problems(401))
def list_benchmarks(settings: AppSettings, principal: Reader) -> Any:
    """Benchmarks that may stand as `dataset`. Their problems come into the data root by `erpo data fetch` or `import`.

    `?level=` and `?subject=` choose among their problems: `math500?level=4,5`. Any task of reasoning-gym, uploaded data
    set or JSONL file of the data root is evaluated in the same way.
    """
    rows = [BENCHMARKS[name] for name in sorted(BENCHMARKS)]
    return page_json(rows, None, lambda row: benchmark_json(row, is_present(row, settings.data_root)))


@router.get("/datasets", response_model=Page[DatasetEntry], responses=problems(400, 401))
def list_datasets(database: Db, principal: Reader, cursor: Cursor = None, limit: Limit = DEFAULT_LIMIT) -> Any:
    """Uploaded data sets, newest first."""
    with database.read() as session:
        page = dataset_rows.list_datasets(session, owner=principal.sees_only, cursor=cursor, limit=limit)
        return JSONResponse(page_json(page.rows, page.next_cursor, dataset_json))


@router.post("/datasets", status_code=201, response_model=DatasetEntry, responses=problems(401, 403, 409, 413, 422))
def upload_dataset(
    file: UploadFile,
    settings: AppSettings,
    principal: Submitter,
    once: OnlyOnce,
    name: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    """Upload JSONL: one object with `problem` and `answer` a line. A broken line refuses the whole, by its number."""
    content = file.file.read()
    digest = hashlib.sha256(content).hexdigest()
    num_rows = check_upload(content)

    def effect(session: Any) -> Answer:
        row = dataset_rows.create_dataset(
            session,
            name=name or file.filename or "upload.jsonl",
            owner=principal.owner,
            sha256=digest,
            size_bytes=len(content),
            num_rows=num_rows,
        )
        session.flush()
        # Before the commit: a row is visible only once its file is complete.
        store_upload(settings.data_root, row.id, content)
        return Answer(201, dataset_json(row))

    return once.about(digest).run(effect).response()


@router.get("/workers", response_model=Page[Worker], responses=problems(401))
def list_workers(database: Db, settings: AppSettings, principal: Reader) -> Any:
    """Workers, when they were last heard of, and what they do."""
    with database.read() as session:
        current = overview.current_jobs(session)
        rows = claim_rows.list_workers(session)
        return JSONResponse(page_json(rows, None, lambda row: worker_json(row, current.get(row.id), settings)))
