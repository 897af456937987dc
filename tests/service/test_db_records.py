"""What children report: completions, checkpoints, results, logs and events; repeated batches change nothing."""

import pytest
from db_rows import call, claim, history, job_of, run_of, store, submit

from erpo_core.errors import FencedError
from erpo_core.records import Checkpoint, Completions, Ended, Event, Metrics, Progress, Resolved, Result
from erpo_core.trainer.state import RunState
from service.db import claims, logs, records, runs


def row(prompt_id: str, sample: int, **values) -> dict:
    body = {"prompt_id": prompt_id, "group": 0, "sample": sample, "prompt": "1+1?", "completion": "2", "gold": "2"}
    body |= {"rewards": {"accuracy": 1.0, "length": None}, "reward": 1.0, "advantage": None, "verdict": "right"}
    return body | {"boxed": True, "truncated": False, "num_tokens": 4} | values


def test_names_that_were_resolved_and_the_result_are_the_run_s(database):
    job = submit(database)
    store(
        database,
        claim(database),
        Resolved({"device": "cpu"}),
        Resolved({"seed": 1}),
        Progress("train", 1, 2),
        Result({"reward": 0.5}),
        Ended("succeeded"),
    )
    run = run_of(database, job.run_id)
    assert (run.resolved, run.result) == ({"device": "cpu", "seed": 1}, {"reward": 0.5})
    assert job_of(database, job.id).status == "running"


def test_an_event_of_a_child_is_in_the_history(database):
    job = submit(database)
    store(database, claim(database), Event("step.skipped", "the loss is NaN", "warn", {"step": 3}))
    (event,) = history(database, job.id, "step.skipped")
    assert (event.level, event.message, event.data, event.attempt) == ("warn", "the loss is NaN", {"step": 3}, 1)
    assert (event.run_id, event.id[:4]) == (job.run_id, "evt_")


def test_completions_are_kept_with_everything_and_paged_in_the_order_of_arrival(database):
    job = submit(database)
    owned = claim(database)
    for step in range(3):
        rows = [row(f"p{number % 5}", number // 5, reward=number / 15) for number in range(15)]
        store(database, owned, Completions(step, rows))
    seen, cursor = [], None
    while True:
        with database.read() as session:
            page = runs.list_completions(session, job.run_id, cursor=cursor, limit=7)
        seen += page.rows
        cursor = page.next_cursor
        if cursor is None:
            break
    assert [(r.step, r.prompt_id, r.sample) for r in seen] == [
        (step, f"p{number % 5}", number // 5) for step in range(3) for number in range(15)
    ]
    assert (seen[3].reward, seen[3].rewards, seen[3].advantage) == (0.2, {"accuracy": 1.0, "length": None}, None)
    assert [event.data["count"] for event in history(database, job.id, "completion.batch")] == [15, 15, 15]


def test_answers_of_a_step_may_come_in_several_records(database):
    job = submit(database)
    store(database, claim(database), *(Completions(1, [row("a", sample)]) for sample in range(3)))
    with database.read() as session:
        assert [found.sample for found in runs.list_completions(session, job.run_id, step=1).rows] == [0, 1, 2]


def test_completions_are_found_by_step_and_verdict(database):
    job = submit(database)
    owned = claim(database)
    for step in (1, 2, 3):
        store(database, owned, Completions(step, [row("a", 0), row("b", 0, verdict="wrong")]))

    def found(**query):
        with database.read() as session:
            return [(r.step, r.prompt_id) for r in runs.list_completions(session, job.run_id, **query).rows]

    assert found(step=2) == [(2, "a"), (2, "b")]
    assert found(step_min=2, verdict="wrong") == [(2, "b"), (3, "b")]
    assert found(step_max=1) == [(1, "a"), (1, "b")]
    assert found(step=10**30) == []
    with database.read() as session:
        assert len(runs.list_items(session, job.run_id, verdict="right").rows) == 3


def test_a_batch_that_is_sent_again_overwrites_itself(database):
    job = submit(database)
    owned = claim(database)
    first = [Metrics(1, {"x": 1.0}), Completions(1, [row("p\0", 0), row("q", 0)]), Checkpoint(1, "/a", [])]
    again = [Metrics(1, {"x": 1.0}), Completions(1, [row("p\0", 0, reward=0.0), row("q", 0)]), Checkpoint(1, "/b", [])]
    store(database, owned, *first)
    store(database, owned, *again)
    with database.read() as session:
        rows = runs.list_completions(session, job.run_id).rows
        (checkpoint,) = runs.list_checkpoints(session, job.run_id)
    assert [(r.prompt_id, r.reward) for r in rows] == [("p\ufffd", 0.0), ("q", 1.0)]
    assert (checkpoint.path, checkpoint.id[:5]) == ("/b", "ckpt_")


def test_a_checkpoint_is_announced_and_listed_by_step(database):
    job = submit(database)
    owned = claim(database)
    files = [{"name": "adapter.safetensors", "size_bytes": 3, "sha256": "ab"}]
    store(database, owned, Checkpoint(20, "/runs/20", files, {"reward": 0.5}), Checkpoint(10, "/runs/10", []))
    with database.read() as session:
        found = runs.list_checkpoints(session, job.run_id)
    assert [(c.step, c.path, c.files, c.data, c.attempt) for c in found] == [
        (10, "/runs/10", [], {}, 1),
        (20, "/runs/20", files, {"reward": 0.5}, 1),
    ]
    announced = history(database, job.id, "checkpoint.created")
    assert [(event.data["step"], event.data["files"]) for event in announced] == [(20, 1), (10, 0)]


REMOVED = Event("checkpoint.removed", "the checkpoint of step 10 makes room for later ones", data={"step": 10})


def test_a_checkpoint_whose_files_made_room_is_forgotten(database):
    job = submit(database)
    store(database, claim(database), Checkpoint(10, "/a/10", []), Checkpoint(20, "/a/20", []), REMOVED)
    with database.read() as session:
        assert [row.step for row in runs.list_checkpoints(session, job.run_id)] == [20]
    (event,) = history(database, job.id, "checkpoint.removed")
    assert event.data == {"step": 10}


def test_what_an_attempt_removes_is_never_an_earlier_ones(database):
    job = submit(database)
    old = claim(database)
    store(database, old, Checkpoint(10, "/attempt-1/10", []))
    call(database, claims.expire_attempt, job.id, old.attempt)
    new = claim(database)
    with pytest.raises(FencedError):
        store(database, old, REMOVED)
    store(database, new, REMOVED)
    with database.read() as session:
        assert [row.path for row in runs.list_checkpoints(session, job.run_id)] == ["/attempt-1/10"]
    store(database, new, Checkpoint(10, "/attempt-2/10", []), REMOVED)
    with database.read() as session:
        assert runs.list_checkpoints(session, job.run_id) == []


@pytest.mark.parametrize(
    ("rewards", "best"), [((0.5, 1.0, 1.0), 20), ((1.0, 0.5, 1.0), 10), ((None, 0.5, None), 20), ((None, None), None)]
)
def test_the_best_checkpoint_is_the_one_that_rotation_keeps(database, rewards, best):
    by_step = {10 * number: reward for number, reward in enumerate(rewards, 1)}
    job = submit(database)
    store(database, claim(database), *(Checkpoint(step, "/x", [], {"reward": r}) for step, r in by_step.items()))
    kept = RunState(checkpoint_rewards={str(step): r for step, r in by_step.items() if r is not None})
    assert kept.best_checkpoint(list(by_step)) == best
    with database.read() as session:
        assert runs.find_checkpoint(session, job.run_id, "best").step == (best or max(by_step))


def test_metrics_are_announced_before_the_checkpoint_of_their_steps(database):
    job = submit(database)
    store(database, claim(database), Metrics(1, {"x": 1.0}), Checkpoint(1, "/a", []), Metrics(2, {"x": 2.0}))
    types = [event.type for event in history(database, job.id)]
    assert types[-3:] == ["metric.batch", "checkpoint.created", "metric.batch"]


def test_a_batch_is_stored_whole_or_not_at_all(database):
    job = submit(database)
    owned = claim(database)
    try:
        store(database, owned, Metrics(1, {"x": 1.0}), Completions(1, [{"sample": 0}]))
    except KeyError:
        pass
    else:
        raise AssertionError("a completion without its prompt's id was stored")
    assert job_of(database, job.id).status == "starting"
    assert history(database, job.id, "metric.batch") == []


def test_a_log_is_read_by_range_over_its_pieces_and_attempts(database):
    job = submit(database)
    owned = claim(database)
    text = bytes(range(256)) * 10
    for start in range(0, len(text), 100):
        call(database, records.append_log, job.id, owned.attempt, text[start : start + 100], 10_000)
    with database.read() as session:
        assert logs.log_size(session, job.id) == len(text)
        for start, end in ((0, 10**9), (0, 1), (99, 101), (1234, 1999), (2559, 2560), (5000, 6000), (7, 7)):
            assert logs.read_log(session, job.id, start, end) == text[start:end], (start, end)
        assert (logs.log_size(session, "job_none"), logs.read_log(session, "job_none", 0, 9)) == (0, b"")
    ranges = [(event.data["start"], event.data["end"]) for event in history(database, job.id, "log.line")]
    assert ranges[:2] == [(0, 100), (100, 200)]


def test_a_full_log_says_so_once_and_grows_no_more(database):
    job = submit(database)
    owned = claim(database)
    for _ in range(5):
        call(database, records.append_log, job.id, owned.attempt, b"x" * 40, 100)
    with database.read() as session:
        stored = logs.read_log(session, job.id, 0, 10**6)
    assert stored.startswith(b"x" * 100 + b"\n[the log is full")
    assert stored.count(b"full") == 1
    assert len(history(database, job.id, "log.line")) == 3
