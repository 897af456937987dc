"""Token traces in the database: ranges, pivots, histograms."""

import numpy as np
import pytest
from db_rows import claim, history, run_of, store, submit
from sqlalchemy import text

from erpo_core.codec import decode_trace, encode_trace
from erpo_core.errors import NotFoundError
from erpo_core.records import Trace
from service.db import claims, traces

NAMES = ("entropy", "logp", "progress", "top_prob", "varentropy")


def columns(size: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {"token_ids": rng.integers(0, 50_000, size), "rank": rng.integers(0, 70_000, size)}
    return found | {name: rng.gamma(0.3, size=size) for name in NAMES}


def trace(step=0, prompt_id="p", sample=0, size=10, seed=0, pivots=(), **meta) -> Trace:
    body = {"prompt_id": prompt_id, "group": 0, "sample": sample, "prompt": "?", "completion": "!", "num_tokens": size}
    body |= {"tokens": [f"t{i}" for i in range(size)], "stats": {"h_mean": 0.5}, "histogram": [1, 2, 3]}
    body |= {"group_stats": {}, "temperature": 1.0, "model_digest": "abc", "pivots": list(pivots)}
    return Trace(step, body | meta, encode_trace(columns(size, seed)))


def pivot(position: int, entropy: float, token="t") -> dict:
    alternatives = [{"token": "a\0", "token_id": 1, "logp": -0.5}]
    return {"position": position, "entropy": entropy, "logp": -1.0, "token": token, "alternatives": alternatives}


@pytest.fixture
def owned(database):
    submit(database, "entropy")
    return claim(database)


def test_a_range_of_a_stored_trace_equals_that_of_the_whole(database, owned):
    size = 5000
    store(database, owned, trace(size=size))
    whole = decode_trace(encode_trace(columns(size)))
    with database.read() as session:
        sequence = traces.get_sequence(session, owned.run_id, 0)
        reader = traces.trace_reader(session, sequence)
        assert (reader.num_tokens, set(reader.channels)) == (size, set(whole))
        for start, end in ((0, None), (0, 1), (255, 257), (1000, 1200), (4999, 5000), (4000, 9999), (7, 7)):
            part = reader.columns(["entropy", "token_ids", "rank"], start, end)
            for name, values in part.items():
                np.testing.assert_array_equal(values, whole[name][start:end], err_msg=f"{name} {start}:{end}")
        full = reader.columns()
        for name, values in whole.items():
            np.testing.assert_array_equal(full[name], values)


def test_only_the_bytes_of_the_range_leave_the_database(database, owned, monkeypatch):
    store(database, owned, trace(size=50_000))
    with database.read() as session:
        sequence = traces.get_sequence(session, owned.run_id, 0)
        reader = traces.trace_reader(session, sequence)
        fetched, read = [], reader._read
        monkeypatch.setattr(reader, "_read", lambda offset, length: fetched.append(read(offset, length)) or fetched[-1])
        reader.columns(["entropy"], 20_000, 20_200)
        blob_bytes = session.scalar(text("SELECT length(data) FROM trace_blobs"))
    assert sum(len(part) for part in fetched) < blob_bytes / 20


def test_sequences_are_numbered_from_0_and_paged_by_number(database, owned):
    for number in range(7):
        store(database, owned, trace(step=number // 4, sample=number))
    assert run_of(database, owned.run_id).num_sequences == 7
    with database.read() as session:
        page = traces.list_sequences(session, owned.run_id, limit=4)
        rest = traces.list_sequences(session, owned.run_id, cursor=page.next_cursor, limit=4)
        late = traces.list_sequences(session, owned.run_id, step=1)
        assert traces.count_sequences(session, owned.run_id) == 7
    assert [row.n for row in page.rows + rest.rows] == list(range(7))
    assert (rest.next_cursor, [row.n for row in late.rows]) == (None, [4, 5, 6])
    assert [event.data["n"] for event in history(database, owned.job_id, "trace.batch")] == list(range(7))


def test_a_sequence_keeps_what_its_numbers_were_measured_with(database, owned):
    store(database, owned, trace(reward=1.0, advantage=-0.5, group_stats={"h_mean": 0.1}))
    with database.read() as session:
        row = traces.get_sequence(session, owned.run_id, 0)
    assert (row.reward, row.advantage, row.tokens[:2], row.group_stats) == (1.0, -0.5, ["t0", "t1"], {"h_mean": 0.1})
    assert row.origin == {"model_digest": "abc", "temperature": 1.0}


@pytest.mark.parametrize("n", [1, -1, 10**30])
def test_a_sequence_that_does_not_exist_is_not_found(database, owned, n):
    store(database, owned, trace())
    with database.read() as session, pytest.raises(NotFoundError):
        traces.get_sequence(session, owned.run_id, n)


def test_a_trace_that_is_sent_again_replaces_itself(database, owned):
    store(database, owned, trace(pivots=[pivot(1, 1.0), pivot(2, 2.0)]))
    store(database, owned, trace(seed=1, pivots=[pivot(3, 3.0)]))
    with database.read() as session:
        row = traces.get_sequence(session, owned.run_id, 0)
        assert traces.count_sequences(session, owned.run_id) == 1
        assert [found.position for found in traces.list_pivots(session, row)] == [3]
        entropy = traces.trace_reader(session, row).columns(["entropy"])["entropy"]
    np.testing.assert_array_equal(entropy, columns(10, 1)["entropy"].astype("f4"))


def test_the_most_uncertain_pivots_of_a_run_come_first(database, owned):
    store(database, owned, trace(sample=0, pivots=[pivot(1, 0.5), pivot(4, 2.0, "\0")]))
    store(database, owned, trace(sample=1, pivots=[pivot(0, 2.0), pivot(9, 1.0)]))
    with database.read() as session:
        top = traces.top_pivots(session, owned.run_id, 3)
        first = traces.get_sequence(session, owned.run_id, 0)
        assert [p.position for p in traces.list_pivots(session, first, 2, 5)] == [4]
    assert [(p.n, p.position, p.entropy) for p in top] == [(0, 4, 2.0), (1, 0, 2.0), (1, 9, 1.0)]
    assert (top[0].token, top[0].alternatives[0]["token"]) == ("\ufffd", "a\ufffd")


def test_the_most_uncertain_pivots_are_found_by_their_index(sqlite_database):
    with sqlite_database.read() as session:
        plan = session.execute(
            text(
                "EXPLAIN QUERY PLAN SELECT * FROM pivots WHERE run_id = 'r' ORDER BY entropy DESC, n, position LIMIT 9"
            )
        ).all()
    assert "ix_pivots_entropy" in str(plan)


def test_histograms_of_a_run_are_added_up(database, owned):
    with database.read() as session:
        assert traces.histogram(session, owned.run_id) == []
    store(database, owned, trace(sample=0), trace(sample=1, histogram=[0, 0, 5]))
    with database.read() as session:
        assert traces.histogram(session, owned.run_id) == [1, 2, 8]


def test_traces_of_a_lost_attempt_of_a_training_are_gone_with_their_pivots_and_numbers(database):
    submit(database, "train")
    owned = claim(database)
    store(database, owned, trace(sample=0, pivots=[pivot(1, 1.0)]), trace(sample=1))
    with database.write() as session:
        claims.expire_attempt(session, owned.job_id, owned.attempt)
    again = claim(database)
    assert run_of(database, owned.run_id).num_sequences == 0
    with database.read() as session:
        assert traces.top_pivots(session, owned.run_id, 9) == []
        assert session.scalar(text("SELECT count(*) FROM trace_blobs")) == 0
    store(database, again, trace(sample=5))
    with database.read() as session:
        assert traces.get_sequence(session, owned.run_id, 0).sample == 5


def test_traces_of_a_lost_attempt_of_an_analysis_stay_for_the_next(database, owned):
    store(database, owned, trace(sample=0, pivots=[pivot(4, 1.0, "a"), pivot(1, 2.0, "b")]), trace(sample=1, seed=1))
    with database.write() as session:
        claims.expire_attempt(session, owned.job_id, owned.attempt)
    claim(database)
    with database.read() as session:
        first, second = traces.stored_traces(session, owned.run_id)
    assert (first["prompt_id"], first["sample"], second["sample"]) == ("p", 0, 1)
    assert [(p["position"], p["entropy"], p["token"]) for p in first["pivots"]] == [(1, 2.0, "b"), (4, 1.0, "a")]
    assert second["pivots"] == []
    assert bytes(second["blob"]) == encode_trace(columns(10, 1))
