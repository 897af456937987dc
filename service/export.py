"""An entropy analysis as one file: Parquet, npz, or a page that opens without a service.

Columns are read sequence by sequence and written as they come: memory does not grow with the analysis.
"""

import json
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
    """One row per token: n, position, token, is_pivot, the token's id and its channels; row groups of some 64k tokens.

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
    names = _channels(database, run_id)
    integers = {
        "n": pyarrow.int32(),
        "position": pyarrow.int32(),
        "token_id": pyarrow.uint32(),
        "rank": pyarrow.uint16(),
    }
    kinds = integers | {"token": pyarrow.string(), "is_pivot": pyarrow.bool_()}
    columns = ("n", "position", "token", "is_pivot", *map(_singular, names))
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.float32())) for name in columns])
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        held, tokens = [], 0
        for columns in _token_columns(database, run_id, names):
            held.append(pyarrow.table(columns, schema))
            tokens += held[-1].num_rows
            if tokens >= _ROW_GROUP_TOKENS:
                writer.write_table(pyarrow.concat_tables(held))
                held, tokens = [], 0
        if held:
            writer.write_table(pyarrow.concat_tables(held))


def write_npz(database: Database, run_id: str, path: Path) -> None:
    """``offsets`` (sequences + 1), ``token_ids`` and the channels of all tokens in a row, ``pivots`` (bool).

    Loads with ``numpy.load(path)``: no pickled objects. The member ``sequences.jsonl`` holds n, prompt and completion.
    """
    lengths = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("sequences.jsonl", "w", force_zip64=True) as file:
            for facts in _each(database, run_id, _facts):
                lengths.append(facts["num_tokens"])
                file.write(json.dumps(facts).encode() + b"\n")
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        _write_long(archive, "offsets", len(offsets), iter([offsets]))
        for name in _channels(database, run_id):
            _write_long(archive, name, int(offsets[-1]), _one_channel(database, run_id, name))
        _write_long(archive, "pivots", int(offsets[-1]), _each(database, run_id, _pivot_mask))


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
    """The stored columns of an analysis, ids of tokens included: every sequence of it has the same."""
    with database.read() as session:
        page = trace_rows.list_sequences(session, run_id, limit=1)
        return trace_rows.trace_reader(session, page.rows[0]).channels if page.rows else []


def _singular(name: str) -> str:
    return "token_id" if name == "token_ids" else name


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


def _facts(_: Session, row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in ("n", "num_tokens", "prompt", "completion")}


def _one_channel(database: Database, run_id: str, name: str) -> Iterator[np.ndarray]:
    return _each(database, run_id, lambda s, row: _wide(trace_rows.trace_reader(s, row).columns([name])[name]))


def _wide(column: np.ndarray) -> np.ndarray:
    """float16 is stored; few readers know it."""
    return column.astype(np.float32) if column.dtype.kind == "f" else column


def _pivot_mask(session: Session, row: Any) -> np.ndarray:
    mask = np.zeros(row.num_tokens, dtype=bool)
    mask[[pivot.position for pivot in trace_rows.list_pivots(session, row)]] = True
    return mask


def _token_columns(database: Database, run_id: str, names: list[str]) -> Iterator[dict[str, Any]]:
    def read(session: Session, row: Any) -> dict[str, Any]:
        columns = trace_rows.trace_reader(session, row).columns(names)
        return {
            "n": np.full(row.num_tokens, row.n, np.int32),
            "position": np.arange(row.num_tokens, dtype=np.int32),
            "token": trace_rows.token_texts(session, run_id, row.n),
            "is_pivot": _pivot_mask(session, row),
            **{_singular(name): _wide(columns[name]) for name in names},
        }

    return _each(database, run_id, read)
