"""When a checkpoint is whole, when it is not, and when nothing is known of it."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from erpo_core.checkpoints import MANIFEST, is_whole, newest_whole, publish


@pytest.fixture
def folder(tmp_path) -> Path:
    return published(tmp_path, 1)


def published(parent: Path, step: int) -> Path:
    written = parent / "writing"
    written.mkdir()
    (written / "weights").write_text("some weights")
    publish(written, parent / f"checkpoint-{step}", step)
    return parent / f"checkpoint-{step}"


def unreadable(path: Path) -> None:
    """Reading it is an input/output error, for whoever reads."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


def unmanifested(content: str):
    return lambda folder: (folder / MANIFEST).write_text(content)


def a_folder_instead(folder: Path) -> None:
    (folder / "weights").unlink()
    (folder / "weights").mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda folder: shutil.rmtree(folder), id="no folder"),
        pytest.param(lambda folder: (folder / MANIFEST).unlink(), id="no manifest"),
        pytest.param(lambda folder: (folder / "weights").unlink(), id="a file is gone"),
        pytest.param(a_folder_instead, id="a file is a folder"),
        pytest.param(lambda folder: (folder / "weights").write_text("some weight"), id="shorter"),
        pytest.param(lambda folder: (folder / "weights").write_text("some Weights"), id="another byte"),
        pytest.param(unmanifested('{"files": [{"na'), id="half a manifest"),
        pytest.param(unmanifested("{}"), id="a manifest of no files"),
        pytest.param(unmanifested("[]"), id="a list"),
        pytest.param(unmanifested('{"files": ["weights"]}'), id="names alone"),
    ],
)
def test_a_damaged_checkpoint_is_not_whole(folder, damage):
    assert is_whole(folder)
    damage(folder)
    assert not is_whole(folder)


@pytest.mark.parametrize("name", ["weights", MANIFEST])
def test_of_a_checkpoint_that_cannot_be_read_nothing_is_known(folder, name):
    """Whoever took it for damaged would throw away what it holds."""
    newer = published(folder.parent, 2)
    assert newest_whole(folder.parent) == newer
    unreadable(newer / name)
    for ask in (is_whole, lambda newest: newest_whole(newest.parent)):
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            ask(newer)
    shutil.rmtree(newer)
    assert newest_whole(folder.parent) == folder
