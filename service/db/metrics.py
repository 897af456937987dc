"""Metric histories: raw rows, buckets of 64, 1,024 and 16,384 steps kept as they arrive, and reading within a bound.

A reader never gets more than it asked for, and never loses a spike: a bucket carries its minimum and maximum.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from sqlalchemy import delete, func, insert, select
from sqlalchemy.orm import Session

from service.db.measured import Metric, MetricBucket, RunSummary
from service.db.types import clamp

WIDTHS = (64, 1024, 16384)
MAX_SERIES = 200
Point = tuple[int, float | None]
BucketKey = tuple[str, int, int]


def write_metrics(s: Session, run_id: str, steps: dict[int, dict[str, float | None]]) -> None:
    """Store the values of some steps. A (name, step) that is stored already is overwritten."""
    stored = {
        (row.name, row.step): row
        for row in s.scalars(select(Metric).where(Metric.run_id == run_id, Metric.step.in_(list(steps))))
    }
    newest = _newest_steps(s, run_id)
    fresh: dict[str, list[Point]] = defaultdict(list)
    stale: set[str] = set()
    for step, values in sorted(steps.items()):
        for name, value in values.items():
            row = stored.get((name, step))
            if row is None:
                fresh[name].append((step, value))
                if step < newest.get(name, step):
                    stale.add(name)
            elif row.value != value:
                row.value = value
                stale.add(name)
    rows = [
        {"run_id": run_id, "name": name, "step": step, "value": value}
        for name, points in fresh.items()
        for step, value in points
    ]
    if rows:
        s.execute(insert(Metric), rows)
    s.flush()
    _summarise(s, run_id, {name: points for name, points in fresh.items() if name not in stale})
    if stale:
        # Steps that change or come late alter what is first and last: rare, and made again from the raw rows.
        for table in (MetricBucket, RunSummary):
            s.execute(delete(table).where(table.run_id == run_id, table.name.in_(stale)))
        rebuild(s, run_id, stale)


def _newest_steps(s: Session, run_id: str) -> dict[str, int]:
    query = select(MetricBucket.name, func.max(MetricBucket.last_step))
    query = query.where(MetricBucket.run_id == run_id, MetricBucket.width == WIDTHS[-1])
    return dict(s.execute(query.group_by(MetricBucket.name)).all())


def rebuild(s: Session, run_id: str, names: Iterable[str] | None = None) -> None:
    """Make the missing buckets and the summary of some series, or of all, from the raw rows."""
    chosen = list(names) if names is not None else None

    def rows_of(table, *columns):
        query = select(*columns).where(table.run_id == run_id)
        return s.execute(query if chosen is None else query.where(table.name.in_(chosen)))

    present = {tuple(row) for row in rows_of(MetricBucket, MetricBucket.name, MetricBucket.width, MetricBucket.start)}
    series: dict[str, list[Point]] = defaultdict(list)
    for name, step, value in rows_of(Metric, Metric.name, Metric.step, Metric.value):
        series[name].append((step, value))
    _summarise(
        s, run_id, {name: sorted(points, key=lambda point: point[0]) for name, points in series.items()}, present
    )


def _summarise(s: Session, run_id: str, series: dict[str, list[Point]], kept: Iterable[BucketKey] = ()) -> None:
    buckets: dict[BucketKey, list[Point]] = defaultdict(list)
    for name, points in series.items():
        for width in WIDTHS:
            for step, value in points:
                buckets[name, width, step // width * width].append((step, value))
    buckets = {key: points for key, points in buckets.items() if key not in kept}
    stored = _stored_buckets(s, run_id, buckets)
    for key, points in buckets.items():
        _extend_bucket(s, run_id, key, points, stored.get(key))
    summaries = {row.name: row for row in s.scalars(select(RunSummary).where(RunSummary.run_id == run_id))}
    for name, points in series.items():
        _extend_summary(s, run_id, name, points, summaries.get(name))
    s.flush()


def _stored_buckets(s: Session, run_id: str, keys: Iterable[BucketKey]) -> dict[BucketKey, MetricBucket]:
    """Those of the buckets that exist, in one query: a flush of many names must not ask for each."""
    starts = {start for _, _, start in keys}
    if not starts:
        return {}
    query = select(MetricBucket).where(MetricBucket.run_id == run_id)
    query = query.where(MetricBucket.start >= min(starts), MetricBucket.start <= max(starts))
    return {(row.name, row.width, row.start): row for row in s.scalars(query)}


def _extend_bucket(s: Session, run_id: str, key: BucketKey, points: list[Point], bucket: MetricBucket | None) -> None:
    if bucket is None:
        name, width, start = key
        bucket = MetricBucket(run_id=run_id, name=name, width=width, start=start, count=0, last_step=-1)
        bucket.first = points[0][1]
        s.add(bucket)
    bucket.count += len(points)
    bucket.min, bucket.max = _extremes(bucket, points)
    if points[-1][0] >= bucket.last_step:
        bucket.last_step, bucket.last = points[-1]


def _extend_summary(s: Session, run_id: str, name: str, points: list[Point], row: RunSummary | None) -> None:
    if row is None:
        row = RunSummary(run_id=run_id, name=name, steps=0)
        s.add(row)
    row.steps += len(points)
    row.min, row.max = _extremes(row, points)
    row.last = points[-1][1]


def _extremes(row: Any, points: list[Point]) -> tuple[float | None, float | None]:
    values = [value for _, value in points if value is not None]
    values += [value for value in (row.min, row.max) if value is not None]
    return (min(values), max(values)) if values else (None, None)


def read_summary(s: Session, run_id: str) -> dict[str, dict[str, float | None]]:
    """{name: {last, min, max, steps}} of a run."""
    rows = s.scalars(select(RunSummary).where(RunSummary.run_id == run_id).order_by(RunSummary.name).limit(1000))
    return {row.name: {"last": row.last, "min": row.min, "max": row.max, "steps": row.steps} for row in rows}


def read_metrics(
    s: Session,
    run_id: str,
    *,
    names: list[str] | None = None,
    step_min: int | None = None,
    step_max: int | None = None,
    max_points: int = 1000,
    smoothing: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Columns of each series: step, value (the last of a bucket), min, max; at most ``max_points`` of each.

    ``smoothing`` is the weight alpha of the newest point: y_0 = x_0, y_t = alpha x_t + (1 - alpha) y_(t-1), over the
    stored points, before they are put into buckets; nulls are skipped.
    """
    totals = _totals(s, run_id, names, step_min, step_max)
    series = {}
    for name, total in totals:
        columns = _columns(s, run_id, name, total, step_min, step_max, 0 if smoothing else max_points)
        if smoothing:
            columns["smoothed"] = _ema(columns["value"], smoothing)
        columns = _bucket(columns, max_points)
        series[name] = {key: _nullable(column) for key, column in columns.items()} | {
            "total_points": total,
            "downsampled": len(columns["step"]) < total,
        }
    return series


def _totals(s: Session, run_id: str, names: list[str] | None, low: int | None, high: int | None) -> list:
    """(name, stored points in the range) of each series. The whole history was counted when it was written."""
    if low is None and high is None:
        query, name = select(RunSummary.name, RunSummary.steps).where(RunSummary.run_id == run_id), RunSummary.name
    else:
        query, name = select(Metric.name, func.count()).where(Metric.run_id == run_id), Metric.name
        query = query.where(*_range(Metric.step, low, high)).group_by(name)
    if names is not None:
        query = query.where(name.in_(names))
    return list(s.execute(query.order_by(name).limit(MAX_SERIES)))


def _range(column, low: int | None, high: int | None) -> list:
    return [
        *([column >= clamp(low)] if low is not None else []),
        *([column <= clamp(high)] if high is not None else []),
    ]


def _columns(s: Session, run_id: str, name: str, total: int, low, high, max_points: int) -> dict[str, np.ndarray]:
    """From the coarsest buckets that still hold ``max_points`` points; the raw rows where none do."""
    width = max((w for w in WIDTHS if max_points and total >= w * max_points), default=0)
    if not width:
        query = select(Metric.step, Metric.value, Metric.value, Metric.value)
        query = query.where(Metric.run_id == run_id, Metric.name == name, *_range(Metric.step, low, high))
        rows = s.execute(query.order_by(Metric.step)).all()
    else:
        table = MetricBucket
        query = select(table.last_step, table.last, table.min, table.max)
        query = query.where(table.run_id == run_id, table.name == name, table.width == width)
        # A bucket that only touches the range belongs to it: its extremes may lie inside.
        query = query.where(*_range(table.last_step, low, None), *_range(table.start, None, high))
        rows = s.execute(query.order_by(table.start)).all()
    step, value, least, greatest = zip(*rows, strict=True) if rows else ((), (), (), ())
    return {
        "step": np.array(step, dtype=np.int64),
        "value": np.array(value, dtype=float),
        "min": np.array(least, dtype=float),
        "max": np.array(greatest, dtype=float),
    }


def _bucket(columns: dict[str, np.ndarray], max_points: int) -> dict[str, np.ndarray]:
    size = len(columns["step"])
    if size <= max_points:
        return columns
    starts = np.unique(np.arange(max_points) * size // max_points)
    ends = np.append(starts[1:], size) - 1
    reduced = {name: column[ends] for name, column in columns.items()}
    reduced["min"] = np.fmin.reduceat(columns["min"], starts)
    reduced["max"] = np.fmax.reduceat(columns["max"], starts)
    return reduced


def _ema(values: np.ndarray, alpha: float) -> np.ndarray:
    smoothed, state = np.empty_like(values), np.nan
    for index, value in enumerate(values):
        if np.isfinite(value):
            state = value if np.isnan(state) else alpha * value + (1 - alpha) * state
        smoothed[index] = state
    return smoothed


def _nullable(column: np.ndarray) -> list:
    if column.dtype.kind in "iu":
        return column.tolist()
    return [value if np.isfinite(value) else None for value in column.tolist()]
