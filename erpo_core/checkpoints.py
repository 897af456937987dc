"""Checkpoints on disk: whole before they have their name. Light: the worker checks them without torch."""

import json
import os
import re
import shutil
from hashlib import file_digest
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_folder(parent: Path, step: int) -> Path:
    """Where the checkpoint of a step lies; transformers' name."""
    return parent / f"checkpoint-{step}"


def publish(source: Path, target: Path, step: int) -> None:
    """Give a written folder its name: every file synced, a manifest with their sha256, then the rename.

    Args:
        source: A folder on the same file system as ``target``.
        target: Must not exist, or be a checkpoint that is not whole.
    """
    files = []
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files.append({"name": str(path.relative_to(source)), "sha256": digest, "size": path.stat().st_size})
    with (source / MANIFEST).open("w") as file:
        json.dump({"step": step, "files": files}, file)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(source)
    if target.exists():
        shutil.rmtree(target)
    source.rename(target)
    _sync_folder(target.parent)


def manifest_files(folder: Path) -> list[dict[str, Any]]:
    """``{name, sha256, size}`` of each file of a published checkpoint."""
    return json.loads((folder / MANIFEST).read_text())["files"]


def is_whole(folder: Path) -> bool:
    """Whether every file of the manifest is there as it was written.

    Raises:
        OSError: one that may be there cannot be read just now: nothing is known of it.
    """
    try:
        for entry in manifest_files(folder):
            with (folder / entry["name"]).open("rb") as file:
                if file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    return False
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False
    except (ValueError, KeyError, TypeError):  # what the manifest holds is no manifest
        return False
    return True


def list_steps(parent: Path) -> list[int]:
    """Steps that have a checkpoint, ascending, whole or not."""
    found = [_NAME.fullmatch(path.name) for path in parent.glob("checkpoint-*") if path.is_dir()]
    return sorted(int(match[1]) for match in found if match)


def newest_whole(parent: Path) -> Path | None:
    """The last checkpoint whose manifest verifies.

    Raises:
        OSError: a later one than that cannot be read just now.
    """
    folders = [checkpoint_folder(parent, step) for step in reversed(list_steps(parent))]
    return next((folder for folder in folders if is_whole(folder)), None)


def rotate(parent: Path, limit: int | None, *, best: int | None, newest: int) -> list[int]:
    """Keep the last ``limit`` checkpoints and the one of step ``best``; the steps that were removed.

    Args:
        newest: The step that was saved last. Later ones are not whole, or of a run that is made again: they do not
            count, and stay.
    """
    steps = [step for step in list_steps(parent) if step <= newest]
    removed = [] if limit is None else [step for step in steps[: -max(1, limit)] if step != best]
    for step in removed:
        shutil.rmtree(checkpoint_folder(parent, step), ignore_errors=True)
    return removed


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
