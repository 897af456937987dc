"""Claims, leases and fences: who may work on a job, and whose writes count."""

import threading

import pytest
from db_rows import call, claim, finish, history, job_of, run_of, store, submit
from sqlalchemy import select

from erpo_core.errors import FencedError
from erpo_core.records import Checkpoint, Completions, Metrics, Progress, Result
from service.db import claims, jobs, metrics, records, runs
from service.db.models import Job

ANSWER = {"prompt_id": "p", "sample": 0, "completion": "4"}


def metric(step: int) -> Metrics:
    return Metrics(step, {"reward": float(step)})


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, f"/runs/step-{step}", [])


def steps(database, run_id) -> list[int]:
    with database.read() as session:
        return metrics.read_metrics(session, run_id).get("reward", {"step": []})["step"]


def test_a_job_is_claimed_once(database):
    job = submit(database, spec={"model": "m", "seed": 3}, time_limit_seconds=9.5)
    first, second = claim(database), claim(database, "worker-b")
    assert (first.job_id, first.run_id, first.attempt, first.kind) == (job.id, job.run_id, 1, "train")
    assert (first.spec, first.time_limit_seconds) == ({"model": "m", "seed": 3}, 9.5)
    assert second is None
    held = job_of(database, job.id)
    assert (held.worker_id, held.heartbeat_seq, held.stalled) == ("worker-a", 1, False)


def test_priority_comes_first_then_the_time_in_the_queue(database):
    late, early = submit(database), submit(database)
    high, low = submit(database, priority=5), submit(database, priority=-5)
    call(database, jobs.request_pause, late.id)
    call(database, jobs.resume_job, late.id)
    assert [claim(database).job_id for _ in range(4)] == [high.id, early.id, late.id, low.id]


def test_only_the_worker_s_queues_count(database):
    submit(database)
    assert call(database, claims.claim_next, queues=["interactive"], worker_id="w", lease_seconds=1) is None


def test_two_workers_claim_fifty_jobs_each_once(database):
    expected = {submit(database).id for _ in range(50)}
    taken = {"a": [], "b": []}

    def work(name):
        while (owned := claim(database, name)) is not None:
            taken[name].append(owned.job_id)

    threads = [threading.Thread(target=work, args=(name,)) for name in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(taken["a"] + taken["b"]) == sorted(expected)


@pytest.mark.postgres
def test_a_worker_does_not_go_away_empty_because_another_one_is_just_claiming(postgres_database):
    database = postgres_database
    first, second = submit(database), submit(database)
    with database.write() as session:
        held = claims.claim_next(session, queues=["default"], worker_id="a", lease_seconds=60)
        assert held.job_id == first.id
        assert claim(database, "b").job_id == second.id


def test_a_draining_worker_gets_nothing(database):
    submit(database)
    call(database, claims.register_worker, "worker-a", host="h", pid=1, queues=["default"])
    with database.write() as session:
        claims.list_workers(session)[0].is_draining = True
    assert claim(database) is None
    assert claim(database, "worker-b") is not None


def test_a_job_waits_for_every_run_it_depends_on(database):
    parents = [submit(database), submit(database)]
    child = submit(database, depends_on=[parent.run_id for parent in parents], priority=9)
    assert job_of(database, child.id).status_reason == "waiting_for_dependency"
    first, second = claim(database), claim(database)
    assert {first.job_id, second.job_id} == {parent.id for parent in parents}
    finish(database, first, "succeeded")
    assert claim(database) is None
    finish(database, second, "succeeded")
    assert claim(database).job_id == child.id


@pytest.mark.parametrize("outcome", ["failed", "cancelled"])
def test_a_job_whose_parent_ended_badly_is_cancelled_and_its_own_children_too(database, outcome):
    parent = submit(database)
    child = submit(database, depends_on=[parent.run_id])
    grandchild = submit(database, depends_on=[child.run_id])
    other = submit(database, priority=-1)
    finish(database, claim(database), outcome)
    assert claim(database).job_id == other.id
    for job in (child, grandchild):
        assert (job_of(database, job.id).status, job_of(database, job.id).status_reason) == (
            "cancelled",
            "dependency_failed",
        )


def test_a_run_that_does_not_exist_never_succeeds(database):
    job = submit(database, depends_on=["run_" + "0" * 32])
    assert claim(database) is None
    assert job_of(database, job.id).status_reason == "dependency_failed"


def test_many_jobs_that_wait_for_others_hide_none_that_could_run(database):
    parent = submit(database)
    claim(database)
    for _ in range(30):
        submit(database, depends_on=[parent.run_id], priority=9)
    ready = submit(database, priority=-9)
    assert claim(database).job_id == ready.id


def test_nothing_of_an_attempt_that_lost_its_job_is_stored(database):
    job = submit(database)
    old = claim(database)
    store(database, old, metric(1))
    assert call(database, claims.expire_attempt, job.id, old.attempt) == "queued"
    for refused in fenced_calls(old):
        with pytest.raises(FencedError):
            refused(database)
    new = claim(database)
    assert new.attempt == 2
    before = job_of(database, job.id).event_seq
    for refused in fenced_calls(old):
        with pytest.raises(FencedError):
            refused(database)
    assert job_of(database, job.id).event_seq == before
    assert steps(database, job.run_id) == []
    store(database, new, metric(7))
    assert steps(database, job.run_id) == [7]


def fenced_calls(old):
    return [
        lambda database: store(database, old, metric(2), checkpoint(2), Result({"x": 1})),
        lambda database: call(database, claims.heartbeat, old.job_id, old.attempt, 60),
        lambda database: call(database, claims.mark_running, old.job_id, old.attempt),
        lambda database: call(database, records.append_log, old.job_id, old.attempt, b"late", 100),
        lambda database: finish(database, old, "succeeded"),
    ]


def test_a_lost_worker_costs_a_retry_until_none_is_left(database):
    job = submit(database, max_retries=2)
    for number in (1, 2, 3):
        owned = claim(database)
        assert owned.attempt == number
        status = call(database, claims.expire_attempt, job.id, owned.attempt)
        assert status == ("queued" if number < 3 else "failed")
    failed = job_of(database, job.id)
    assert (failed.status_reason, failed.error["code"], failed.num_retries) == ("worker_lost", "worker_lost", 2)


def test_a_worker_that_is_stopped_costs_no_retry(database):
    job = submit(database, max_retries=0)
    for _ in range(3):
        finish(database, claim(database), "requeued", reason="worker_stopped")
    again = job_of(database, job.id)
    assert (again.status, again.num_retries, again.attempt) == ("queued", 0, 3)


@pytest.mark.parametrize(
    ("action", "status"), [(jobs.request_pause, "paused"), (jobs.request_cancel, "cancelled")], ids=["pause", "cancel"]
)
def test_what_was_asked_for_before_the_worker_was_lost_holds(database, action, status):
    job = submit(database)
    owned = claim(database)
    call(database, action, job.id)
    assert call(database, claims.expire_attempt, job.id, owned.attempt) == status
    assert job_of(database, job.id).desired_status is None


def test_a_lease_that_was_renewed_in_the_last_moment_is_not_expired(database):
    job = submit(database)
    owned = claim(database)
    with database.read() as session:
        (lease,) = claims.running_leases(session)
    assert (lease.job_id, lease.attempt) == (job.id, 1)
    call(database, claims.heartbeat, job.id, owned.attempt, 60)
    assert call(database, claims.expire_attempt, job.id, 1, lease.heartbeat_seq) is None
    assert call(database, claims.expire_attempt, job.id, 1, lease.heartbeat_seq + 1) == "queued"
    assert call(database, claims.expire_attempt, job.id, 1) is None


def test_the_next_attempt_goes_back_to_the_last_checkpoint(database):
    job = submit(database)
    old = claim(database)
    store(database, old, metric(1), Completions(1, [ANSWER]), metric(2), checkpoint(2), metric(3))
    store(database, old, Completions(3, [ANSWER]))
    call(database, claims.expire_attempt, job.id, old.attempt)
    new = claim(database)
    assert steps(database, job.run_id) == [1, 2]
    (rewound,) = history(database, job.id, "run.rewound")
    assert (rewound.data, rewound.attempt) == ({"to_step": 2}, 2)
    with database.read() as session:
        assert [row.step for row in runs.list_completions(session, job.run_id).rows] == [1]
        assert [row.step for row in runs.list_checkpoints(session, job.run_id)] == [2]
        assert metrics.read_summary(session, job.run_id)["reward"] == {"last": 2, "min": 1, "max": 2, "steps": 2}
    store(database, new, metric(3), checkpoint(3))
    assert steps(database, job.run_id) == [1, 2, 3]


def test_without_a_checkpoint_the_next_attempt_begins_anew(database):
    job = submit(database)
    old = claim(database)
    store(database, old, metric(0), metric(1))
    call(database, claims.expire_attempt, job.id, old.attempt)
    claim(database)
    assert steps(database, job.run_id) == []
    assert history(database, job.id, "run.rewound")[0].data == {"to_step": -1}


def test_nothing_is_rewound_where_nothing_was_lost(database):
    job = submit(database)
    store(database, claim(database), metric(1), checkpoint(1))
    call(database, claims.expire_attempt, job.id, 1)
    claim(database)
    assert history(database, job.id, "run.rewound") == []


def test_stored_answers_of_an_evaluation_stay(database):
    job = submit(database, "evaluate")
    store(database, claim(database), Completions(0, [ANSWER, ANSWER | {"sample": 1}]))
    call(database, claims.expire_attempt, job.id, 1)
    claim(database)
    with database.read() as session:
        answers = runs.stored_answers(session, job.run_id)
    assert [(answer["prompt_id"], answer["sample"], answer["completion"]) for answer in answers] == [
        ("p", 0, "4"),
        ("p", 1, "4"),
    ]
    assert history(database, job.id, "run.rewound") == []


def test_jobs_that_wait_too_long_are_named_the_best_first(database):
    low, high = submit(database), submit(database, priority=1)
    with database.read() as session:
        assert claims.unclaimed_jobs(session, -1) == [high.id, low.id]
        assert claims.unclaimed_jobs(session, 60) == []


def test_workers_are_known_by_their_last_sign_of_life(database):
    for name in ("one", "two"):
        call(database, claims.register_worker, name, host="h", pid=1, queues=["default"])
    call(database, claims.beat_worker, "one")
    call(database, claims.beat_worker, "unknown")
    with database.read() as session:
        assert [worker.id for worker in claims.list_workers(session)] == ["one", "two"]
        assert claims.list_workers(session, alive_within=-1) == []


def test_a_claim_that_is_rolled_back_leaves_the_job_in_the_queue(database):
    job = submit(database)
    with database.read() as session:
        assert claims.claim_next(session, queues=["default"], worker_id="w", lease_seconds=1).job_id == job.id
    with database.read() as session:
        assert session.scalars(select(Job.status)).one() == "queued"
    assert run_of(database, job.run_id).job_id == job.id
    assert claim(database).attempt == 1


def test_progress_of_an_older_attempt_is_forgotten(database):
    job = submit(database)
    store(database, claim(database), Progress("train", 5, 10, {"reward": 0.5}))
    assert job_of(database, job.id).progress == {"phase": "train", "done": 5, "total": 10, "reward": 0.5}
    call(database, claims.expire_attempt, job.id, 1)
    claim(database)
    assert job_of(database, job.id).progress is None
