"""An entropy analysis as one file: Parquet, npz, or a page that opens without a service.

Columns are read sequence by sequence and written as they come: memory does not grow with the analysis.
"""

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy.orm import Session

from service.db import traces as trace_rows
from service.db.engine import Database
from service.errors import RequestError

_ROW_GROUP_TOKENS = 65_536
_PAGE = 200


def write_parquet(database: Database, run_id: str, path: Path) -> None:
    """One row per token: n, position, token, token_id, is_pivot and the channels; row groups of some 64k tokens.

    Raises:
        RequestError: ``format_unavailable``: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RequestError(
            "Parquet needs pyarrow where the API runs (pip install 'erpo-lab[export]'); format=npz needs nothing",
            code="format_unavailable",
        ) from None
    writer = None
    held, tokens = [], 0

    def flush() -> None:
        nonlocal writer, held, tokens
        table = pyarrow.concat_tables(held, promote_options="default")
        writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table.select(writer.schema.names) if writer.schema != table.schema else table)
        held, tokens = [], 0

    names = _channels(database, run_id)
    for table in map(pyarrow.table, _token_tables(database, run_id, names)):
        held.append(table)
        tokens += table.num_rows
        if tokens >= _ROW_GROUP_TOKENS:
            flush()
    if held:
        flush()
    if writer is None:
        empty = pyarrow.table({name: [] for name in ("n", "position", "token", "token_id", "is_pivot", *names)})
        writer = pyarrow.parquet.ParquetWriter(path, empty.schema)
    writer.close()


def write_npz(database: Database, run_id: str, path: Path) -> None:
    """``offsets`` (sequences + 1), the channels and ``token_ids`` of all tokens in a row, ``pivots`` (bool), texts.

    Loads with ``numpy.load(path)``: no pickled objects.
    """
    rows = list(_facts(database, run_id))
    lengths = np.array([row["num_tokens"] for row in rows], dtype=np.int64)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        small = {"offsets": offsets, "n": np.array([row["n"] for row in rows], dtype=np.int64)}
        small |= {key: np.array([row[key] for row in rows], dtype=str) for key in ("prompt", "completion")}
        for name, array in small.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
        for name in ("token_ids", *_channels(database, run_id)):
            _write_long(archive, name, int(offsets[-1]), _one_channel(database, run_id, name))
        _write_long(archive, "pivots", int(offsets[-1]), _pivot_masks(database, run_id))


def _write_long(archive: zipfile.ZipFile, name: str, size: int, parts: Iterator[np.ndarray]) -> None:
    """An array that is never whole in memory; its header says what its parts will be together."""
    first = next(parts, np.empty(0, np.float32))
    header = {"descr": first.dtype.str, "fortran_order": False, "shape": (size,)}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(first.tobytes())
        for part in parts:
            file.write(part.astype(first.dtype).tobytes())


def _channels(database: Database, run_id: str) -> list[str]:
    """Channels of the first sequence; another that lacks one has NaN there."""
    with database.read() as session:
        page = trace_rows.list_sequences(session, run_id, limit=1)
        found = trace_rows.trace_reader(session, page.rows[0]).channels if page.rows else []
    return [name for name in found if name != "token_ids"]


def _each(database: Database, run_id: str, read: Callable[[Session, Any], Any]) -> Iterator[Any]:
    """``read`` of every sequence in order; no connection is held between pages."""
    cursor = None
    while True:
        with database.read() as session:
            page = trace_rows.list_sequences(session, run_id, cursor=cursor, limit=_PAGE)
            found = [read(session, row) for row in page.rows]
        yield from found
        if (cursor := page.next_cursor) is None:
            return


def _facts(database: Database, run_id: str) -> Iterator[dict[str, Any]]:
    names = ("n", "num_tokens", "prompt", "completion")
    return _each(database, run_id, lambda _, row: {name: getattr(row, name) for name in names})


def _one_channel(database: Database, run_id: str, name: str) -> Iterator[np.ndarray]:
    def read(session: Session, row: Any) -> np.ndarray:
        reader = trace_rows.trace_reader(session, row)
        if name not in reader.channels:
            return np.full(row.num_tokens, np.nan, np.float32)
        column = reader.columns([name])[name]
        return column.astype(np.float32) if column.dtype.kind == "f" else column

    return _each(database, run_id, read)


def _pivot_masks(database: Database, run_id: str) -> Iterator[np.ndarray]:
    return _each(database, run_id, _pivot_mask)


def _pivot_mask(session: Session, row: Any) -> np.ndarray:
    mask = np.zeros(row.num_tokens, dtype=bool)
    mask[[pivot.position for pivot in trace_rows.list_pivots(session, row)]] = True
    return mask


def _token_tables(database: Database, run_id: str, names: list[str]) -> Iterator[dict[str, Any]]:
    def read(session: Session, row: Any) -> dict[str, Any]:
        reader = trace_rows.trace_reader(session, row)
        columns = reader.columns()
        missing = np.full(row.num_tokens, np.nan, np.float32)
        table = {
            "n": np.full(row.num_tokens, row.n, np.int32),
            "position": np.arange(row.num_tokens, dtype=np.int32),
            "token": trace_rows.token_texts(session, run_id, row.n),
            "token_id": columns["token_ids"],
            "is_pivot": _pivot_mask(session, row),
        }
        for name in names:
            column = columns.get(name, missing)
            table[name] = column.astype(np.float32) if column.dtype.kind == "f" else column
        return table

    return _each(database, run_id, read)
