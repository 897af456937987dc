"""Uploaded data sets: checked line by line, then kept as one immutable file."""

import os
from pathlib import Path

from erpo_core.data.formats import parse_lines
from erpo_core.errors import DatasetError

UPLOADS = "uploads"


def check_upload(content: bytes) -> int:
    """The number of problems.

    Raises:
        DatasetError: naming the broken line.
    """
    num_rows = sum(1 for _ in parse_lines(content.splitlines(), "upload", pointer="/file"))
    if not num_rows:
        raise DatasetError(
            "the file holds no problem",
            pointer="/file",
            mend='write one JSON object a line, for example {"problem": "What is 2 + 2?", "answer": "4"}',
            code="empty_dataset",
        )
    return num_rows


def store_upload(data_root: Path, dataset_id: str, content: bytes) -> Path:
    """Write the file completely or not at all."""
    path = data_root / UPLOADS / f"{dataset_id}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    with draft.open("wb") as target:
        target.write(content)
        target.flush()
        os.fsync(target.fileno())
    draft.replace(path)
    return path
