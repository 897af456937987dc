"""Metric histories: buckets, summaries and bounded reads against plain loops over the same numbers."""

import math
import random

import pytest
from db_rows import claim, history, store, submit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from erpo_core.records import Metrics
from service.db.measured import MetricBucket
from service.db.metrics import WIDTHS, read_metrics, read_summary, write_metrics

SERIES = {"reward": lambda step: math.sin(step / 50) * step, "gap": lambda step: None if step % 7 else float(step)}


def write(database, run_id, steps, size=500, names=("reward",)) -> dict[str, dict[int, float | None]]:
    with database.write() as session:
        for start in range(0, len(steps), size):
            batch = {step: {name: SERIES[name](step) for name in names} for step in steps[start : start + size]}
            write_metrics(session, run_id, batch)
    return {name: {step: SERIES[name](step) for step in steps} for name in names}


def read(database, run_id, **query) -> dict:
    with database.read() as session:
        return read_metrics(session, run_id, **query)


def expected_bucket(points: list[tuple[int, float | None]]) -> tuple:
    values = [value for _, value in points if value is not None]
    extremes = (min(values), max(values)) if values else (None, None)
    return (len(points), *extremes, points[0][1], points[-1][1], points[-1][0])


def check_buckets(database, run_id, truth: dict[str, dict[int, float | None]]) -> None:
    expected = {}
    for name, series in truth.items():
        for width in WIDTHS:
            groups: dict[int, list] = {}
            for step in sorted(series):
                groups.setdefault(step // width * width, []).append((step, series[step]))
            expected |= {(name, width, start): expected_bucket(points) for start, points in groups.items()}
    with database.read() as session:
        rows = session.scalars(select(MetricBucket).where(MetricBucket.run_id == run_id)).all()
    found = {(r.name, r.width, r.start): (r.count, r.min, r.max, r.first, r.last, r.last_step) for r in rows}
    assert found == expected


def test_buckets_equal_those_of_a_plain_loop_however_the_steps_arrived(database):
    run_id = submit(database).run_id
    truth = write(database, run_id, list(range(0, 2500, 2)), size=37, names=("reward", "gap"))
    check_buckets(database, run_id, truth)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batches=st.lists(
        st.dictionaries(st.integers(0, 2000), st.none() | st.floats(-1e6, 1e6), min_size=1, max_size=20), max_size=6
    )
)
def test_repeated_and_changed_steps_leave_the_buckets_of_the_last_values(sqlite_database, batches):
    run_id = submit(sqlite_database).run_id
    truth: dict[int, float | None] = {}
    for batch in batches:
        with sqlite_database.write() as session:
            write_metrics(session, run_id, {step: {"x": value} for step, value in batch.items()})
        truth |= batch
    check_buckets(sqlite_database, run_id, {"x": truth} if truth else {})
    with sqlite_database.read() as session:
        summary = read_summary(session, run_id)
    if truth:
        values = [value for value in truth.values() if value is not None]
        assert summary["x"]["steps"] == len(truth)
        assert summary["x"]["last"] == truth[max(truth)]
        assert summary["x"]["max"] == (max(values) if values else None)


def test_a_short_history_is_read_as_it_is(database):
    run_id = submit(database).run_id
    write(database, run_id, [1, 2, 7], names=("reward", "gap"))
    series = read(database, run_id)
    assert series["reward"]["step"] == [1, 2, 7]
    assert series["reward"]["value"] == series["reward"]["min"] == series["reward"]["max"]
    assert series["gap"]["value"] == [None, None, 7.0]
    assert (series["gap"]["total_points"], series["gap"]["downsampled"]) == (3, False)


@pytest.mark.parametrize("size", [900, 20_000])
def test_a_reader_gets_no_more_points_than_it_asked_for_and_loses_no_spike(sqlite_database, size):
    run_id = submit(sqlite_database).run_id
    spikes = {size // 3: 1e6, size // 2: -1e6}
    values = {step: {"x": spikes.get(step, float(step % 10))} for step in range(size)}
    with sqlite_database.write() as session:
        for start in range(0, size, 10_000):
            write_metrics(session, run_id, {step: values[step] for step in range(start, min(start + 10_000, size))})
    for most in (1, 10, 50, 500):
        x = read(sqlite_database, run_id, max_points=most)["x"]
        assert 0 < len(x["step"]) <= most
        assert (min(x["min"]), max(x["max"]), x["total_points"], x["downsampled"]) == (-1e6, 1e6, size, True)
        assert x["step"] == sorted(set(x["step"]))
        assert (x["step"][-1], x["value"][-1]) == (size - 1, float((size - 1) % 10))
        bounds = [-1, *x["step"]]
        for low, high, least, most_of in zip(bounds, bounds[1:], x["min"], x["max"], strict=False):
            inside = [values[step]["x"] for step in range(low + 1, high + 1)]
            assert (least, most_of) == (min(inside), max(inside))


def test_names_and_steps_narrow_what_is_read(database):
    run_id = submit(database).run_id
    write(database, run_id, list(range(100)), names=("reward", "gap"))
    assert set(read(database, run_id)) == {"reward", "gap"}
    assert read(database, run_id, names=[]) == read(database, run_id, names=["other"]) == {}
    series = read(database, run_id, names=["reward"], step_min=10, step_max=12)
    assert list(series) == ["reward"]
    assert (series["reward"]["step"], series["reward"]["total_points"]) == ([10, 11, 12], 3)
    assert read(database, run_id, step_min=10**30) == read(database, run_id, step_max=-(10**30)) == {}


def test_smoothing_starts_at_the_first_value_passes_over_gaps_and_keeps_the_raw_values(database):
    run_id = submit(database).run_id
    values = [1.0, None, 3.0, 5.0]
    with database.write() as session:
        write_metrics(session, run_id, {step: {"x": value} for step, value in enumerate(values)})
    x = read(database, run_id, smoothing=0.25)["x"]
    assert x["value"] == values
    assert x["smoothed"] == pytest.approx([1.0, 1.0, 1.5, 2.375])
    thinned = read(database, run_id, smoothing=0.25, max_points=2)["x"]
    assert thinned["smoothed"] == pytest.approx([1.0, 2.375])


def test_a_batch_of_metrics_is_one_event_that_names_its_range(database):
    job = submit(database)
    store(database, claim(database), *(Metrics(step, {"a": 1.0, f"b{step}": None}) for step in (1, 2, 3)))
    (event,) = history(database, job.id, "metric.batch")
    assert event.data == {
        "step_min": 1,
        "step_max": 3,
        "names": ["a", "b1", "b2", "b3"],
        "values": {"a": 1.0, "b3": None},
    }


def test_a_batch_that_is_stored_twice_changes_nothing(database):
    job = submit(database)
    owned = claim(database)
    batch = [Metrics(step, {"reward": random.Random(step).random()}) for step in range(200)]
    store(database, owned, *batch)
    once = read(database, job.run_id, max_points=2)
    store(database, owned, *batch)
    assert read(database, job.run_id, max_points=2) == once
    with database.read() as session:
        assert read_summary(session, job.run_id)["reward"]["steps"] == 200
