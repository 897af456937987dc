"""A folder as a tar stream of known length: nothing is written to disk, nothing large is held in memory."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

from erpo_core.errors import NotFoundError

_CHUNK = 2**20
_BLOCK = tarfile.BLOCKSIZE


def stream_tar(folder: str | Path, root: Path) -> tuple[Iterator[bytes], int]:
    """The archive's content and its size in bytes.

    Raises:
        NotFoundError: the folder is gone, or does not lie below ``root``.
    """
    path = Path(folder).resolve()
    if not path.is_relative_to(root.resolve()) or not path.is_dir():
        raise NotFoundError("the files of this checkpoint are gone")
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.is_symlink())
    members = [(file, _header(file, path), file.stat().st_size) for file in files]
    size = sum(len(header) + _padded(length) for _, header, length in members) + 2 * _BLOCK
    return _content(members), size


def _content(members: list[tuple[Path, bytes, int]]) -> Iterator[bytes]:
    for file, header, length in members:
        yield header
        left = length
        with file.open("rb") as source:
            while left and (chunk := source.read(min(_CHUNK, left))):
                left -= len(chunk)
                yield chunk
        # A file that shrank meanwhile must not shift what follows.
        yield bytes(_padded(length) - length + left)
    yield bytes(2 * _BLOCK)


def _header(file: Path, folder: Path) -> bytes:
    info = tarfile.TarInfo(file.relative_to(folder).as_posix())
    status = file.stat()
    info.size, info.mtime, info.mode = status.st_size, int(status.st_mtime), 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def _padded(length: int) -> int:
    return -(-length // _BLOCK) * _BLOCK
