"""What users do to jobs: the state machine, its events, lists, deletion."""

from datetime import timedelta

import pytest
from db_rows import call, claim, finish, history, job_of, path_of, run_of, store, submit

from erpo_core.errors import ConflictError, FencedError, NotFoundError, SpecError
from erpo_core.records import Progress
from service.db import claims, jobs, runs
from service.db.events import latest_seqs, list_events
from service.db.states import ACTIVE, STATUSES, TERMINAL, check_transition, is_terminal
from service.db.types import now

STEP = Progress("train", 1, 10)


def test_a_job_goes_from_queued_to_succeeded_and_every_transition_is_an_event(database):
    job = submit(database)
    owned = claim(database)
    assert job_of(database, job.id).status == "starting"
    store(database, owned, STEP)
    assert job_of(database, job.id).status == "running"
    finish(database, owned, "succeeded")
    done = job_of(database, job.id)
    assert (done.status, done.is_terminal, done.worker_id, done.lease_expires_at) == ("succeeded", True, None, None)
    assert done.created_at <= done.queued_at <= done.started_at <= done.finished_at
    seen = [event for event in history(database, job.id) if event.type == "job.status"]
    assert [(event.data["from"], event.data["to"], event.attempt) for event in seen] == [
        (None, "queued", 0),
        ("queued", "starting", 1),
        ("starting", "running", 1),
        ("running", "succeeded", 1),
    ]


def test_events_are_numbered_from_1_without_gaps_and_are_read_from_any_number_on(database):
    job = submit(database)
    owned = claim(database)
    store(database, owned, *(Progress("train", done, 9) for done in range(9)))
    seqs = [event.seq for event in history(database, job.id)]
    assert seqs == list(range(1, job_of(database, job.id).event_seq + 1))
    with database.read() as session:
        assert [event.seq for event in list_events(session, job.id, after_seq=3, limit=4)] == [4, 5, 6, 7]
        assert list_events(session, job.id, after_seq=10**30) == []
        assert latest_seqs(session, [job.id, "job_none"]) == {job.id: seqs[-1]}


def test_the_state_machine_lets_nothing_out_of_success_and_nothing_skip_the_claim():
    for target in STATUSES:
        with pytest.raises(ConflictError) as refusal:
            check_transition("succeeded", target)
        assert (refusal.value.code, refusal.value.state) == ("illegal_transition", "succeeded")
    for target in ("running", "succeeded", "failed", "pausing", "cancelling"):
        with pytest.raises(ConflictError):
            check_transition("queued", target)
    assert {status for status in STATUSES if is_terminal(status)} == TERMINAL
    assert not TERMINAL & ACTIVE


ENDS = {
    "queued": lambda database: submit(database),
    "succeeded": lambda database: ended(database, "succeeded"),
    "failed": lambda database: ended(database, "failed"),
    "cancelled": lambda database: ended(database, "cancelled"),
    "paused": lambda database: ended(database, "paused"),
    "running": lambda database: started(database),
}


def started(database):
    job = submit(database)
    store(database, claim(database), STEP)
    return job


def ended(database, outcome):
    job = submit(database)
    finish(database, claim(database), outcome)
    return job


@pytest.mark.parametrize(
    ("status", "action", "result"),
    [
        ("queued", jobs.request_cancel, "cancelled"),
        ("queued", jobs.request_pause, "paused"),
        ("queued", jobs.resume_job, None),
        ("queued", jobs.retry_job, None),
        ("queued", jobs.delete_job, None),
        ("running", jobs.request_cancel, "cancelling"),
        ("running", jobs.request_pause, "pausing"),
        ("running", jobs.resume_job, None),
        ("running", jobs.retry_job, None),
        ("running", jobs.delete_job, None),
        ("paused", jobs.request_cancel, "cancelled"),
        ("paused", jobs.request_pause, "paused"),
        ("paused", jobs.resume_job, "queued"),
        ("paused", jobs.retry_job, None),
        ("succeeded", jobs.request_cancel, None),
        ("succeeded", jobs.request_pause, None),
        ("succeeded", jobs.resume_job, None),
        ("succeeded", jobs.retry_job, None),
        ("failed", jobs.request_cancel, None),
        ("failed", jobs.request_pause, None),
        ("failed", jobs.retry_job, "queued"),
        ("cancelled", jobs.request_cancel, "cancelled"),
        ("cancelled", jobs.request_pause, None),
        ("cancelled", jobs.retry_job, "queued"),
    ],
)
def test_each_action_is_legal_in_its_states_only(database, status, action, result):
    job = ENDS[status](database)
    if result is None:
        with pytest.raises(ConflictError) as refusal:
            call(database, action, job.id)
        assert refusal.value.state == status
        assert job_of(database, job.id).status == status
    else:
        assert call(database, action, job.id).status == result == job_of(database, job.id).status


def test_cancelling_a_cancelled_job_changes_nothing(database):
    job = ended(database, "cancelled")
    before = job_of(database, job.id).event_seq
    call(database, jobs.request_cancel, job.id, "now")
    assert job_of(database, job.id).event_seq == before


def test_the_heartbeat_tells_what_the_user_wants(database):
    job = submit(database)
    owned = claim(database)
    beat = (database, claims.heartbeat, job.id, owned.attempt, 60)
    assert call(*beat) is None
    call(database, jobs.request_pause, job.id)
    assert call(*beat) == "paused"
    call(database, jobs.request_cancel, job.id)
    assert call(*beat) == "cancelled"
    call(database, jobs.request_cancel, job.id, "now")
    assert call(*beat) == "cancelled_now"
    finish(database, owned, "cancelled", reason="user_request")
    done = job_of(database, job.id)
    assert (done.status, done.desired_status, done.status_reason) == ("cancelled", None, "user_request")
    with pytest.raises(FencedError):
        call(*beat)


@pytest.mark.parametrize("outcome", ["paused", "requeued"])
def test_a_job_cancelled_while_its_child_leaves_for_another_reason_is_cancelled(database, outcome):
    job = submit(database)
    owned = claim(database)
    call(database, jobs.request_pause, job.id)
    call(database, jobs.request_cancel, job.id)
    finish(database, owned, outcome)
    assert job_of(database, job.id).status == "cancelled"


def test_resume_and_retry_add_an_attempt_to_the_same_job_and_run(database):
    job = ended(database, "paused")
    call(database, jobs.resume_job, job.id)
    second = claim(database)
    assert (second.job_id, second.run_id, second.attempt) == (job.id, job.run_id, 2)
    finish(database, second, "failed", reason="oom", error={"code": "oom", "message": "m", "log_tail": "t"})
    failed = job_of(database, job.id)
    assert (failed.status_reason, failed.error["log_tail"]) == ("oom", "t")
    call(database, jobs.retry_job, job.id)
    again = job_of(database, job.id)
    assert (again.status, again.error, again.finished_at) == ("queued", None, None)
    assert claim(database).attempt == 3
    assert path_of(database, job.id) == [
        "queued",
        "starting",
        "paused",
        "queued",
        "starting",
        "failed",
        "queued",
        "starting",
    ]


def test_an_id_that_names_nothing_is_not_found(database):
    for read in (jobs.get_job, jobs.get_run, jobs.request_cancel, jobs.delete_job, jobs.retry_job):
        with pytest.raises(NotFoundError):
            call(database, read, "job_none")


def test_a_deleted_job_and_its_run_are_hidden(database):
    job = ended(database, "succeeded")
    call(database, jobs.delete_job, job.id)
    with pytest.raises(NotFoundError):
        job_of(database, job.id)
    with pytest.raises(NotFoundError):
        run_of(database, job.run_id)
    with database.read() as session:
        assert jobs.list_jobs(session).rows == runs.list_runs(session).rows == []


def test_name_tags_and_priority_may_change_and_nothing_else(database):
    job = submit(database, name="a", tags=["x"], priority=1)
    call(database, jobs.update_job, job.id, name="b", tags=("y", "z"), status="succeeded")
    changed = job_of(database, job.id)
    assert (changed.name, changed.tags, changed.priority, changed.status) == ("b", ["y", "z"], 1, "queued")


def test_filters_hold_together(database):
    first = submit(database, "train", {"model": "a"}, owner="ann", tags=["x%", "Ä"])
    second = submit(database, "evaluate", {"model": {"run": first.run_id, "checkpoint": "last"}}, tags=["xx", "X%"])
    call(database, jobs.request_cancel, second.id)
    expected = {
        ("kind", "train"): [first.id],
        ("status", "cancelled"): [second.id],
        ("tag", "x%"): [first.id],
        ("tag", "X%"): [second.id],
        ("tag", "x"): [],
        ("tag", "Ä"): [first.id],
        ("tag", '"'): [],
        ("model", "a"): [first.id],
        ("model", first.run_id): [second.id],
        ("owner", "ann"): [first.id],
        ("created_after", now() - timedelta(minutes=1)): [second.id, first.id],
        ("created_before", now() - timedelta(minutes=1)): [],
    }
    with database.read() as session:
        for (name, value), ids in expected.items():
            assert [job.id for job in jobs.list_jobs(session, **{name: value}).rows] == ids, (name, value)
        assert jobs.list_jobs(session, kind="train", status="cancelled").rows == []
        assert [run.id for run in runs.list_runs(session, target=first.run_id).rows] == [second.run_id]
        assert [run.id for run in runs.list_runs(session, tag="Ä", kind="train").rows] == [first.run_id]


def test_pages_follow_each_other_without_loss_while_jobs_are_added_and_removed(database):
    ids = [submit(database).id for _ in range(25)]
    seen, cursor = [], None
    while True:
        with database.read() as session:
            page = jobs.list_jobs(session, cursor=cursor, limit=4)
        seen += [job.id for job in page.rows]
        submit(database)
        if len(seen) == 8:
            call(database, jobs.request_cancel, seen[-1])
            call(database, jobs.delete_job, seen[-1])
        cursor = page.next_cursor
        if cursor is None:
            break
    assert seen == ids[::-1]


@pytest.mark.parametrize("cursor", ["?", "bm90IGpzb24", "MTI", "", "WyJ4Il0"])
def test_a_cursor_from_elsewhere_is_refused(database, cursor):
    with database.read() as session, pytest.raises(SpecError) as refusal:
        jobs.list_jobs(session, cursor=cursor)
    assert refusal.value.code == "invalid_cursor"
