"""The real supervisor, recorder and database around a child that follows a script."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from service.db import claims, jobs, logs, metrics, runs
from service.db.jobs import create_job
from workers.processes import attempt_processes
from workers.sweeper import Sweeper
from workers.tasks import Desk

pytestmark = pytest.mark.timeout(60)


def submit(database, *script, **options) -> str:
    with database.write() as session:
        job = create_job(session, kind="train", spec={"model": "tiny", "script": list(script)}, options=options)
        return job.id


def job_of(database, job_id):
    with database.read() as session:
        job = jobs.get_job(session, job_id)
        session.expunge(job)
        return job


def rewards(database, job_id) -> list[int]:
    with database.read() as session:
        series = metrics.read_metrics(session, jobs.get_job(session, job_id).run_id)
    return series["reward"]["step"] if "reward" in series else []


def checkpoints(database, job_id) -> list[int]:
    with database.read() as session:
        return sorted(row.step for row in runs.list_checkpoints(session, jobs.get_job(session, job_id).run_id))


def wait_for(condition, seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


def in_background(desk) -> threading.Thread:
    thread = threading.Thread(target=desk.ring, daemon=True)
    thread.start()
    return thread


def test_a_job_runs_to_its_end_and_its_records_and_log_are_stored(desk, database):
    job_id = submit(database, ["print", "hello from the child"], ["metrics", 1, 5], ["checkpoint", 5])
    assert desk.ring() == 1
    job = job_of(database, job_id)
    assert (job.status, job.attempt, job.error) == ("succeeded", 1, None)
    assert rewards(database, job_id) == [1, 2, 3, 4, 5]
    assert checkpoints(database, job_id) == [5]
    assert b"hello from the child" in read_log(database, job_id)


def read_log(database, job_id) -> bytes:
    with database.read() as session:
        return logs.read_log(session, job_id, 0, 10**9)


def test_a_killed_child_fails_its_job_with_the_log_tail_and_the_next_job_runs(desk, database):
    first = submit(database, ["print", "last words"], ["metrics", 1, 2], ["kill", 9])
    second = submit(database, ["metrics", 1, 1])
    assert desk.ring() == 2
    job = job_of(database, first)
    assert (job.status, job.status_reason) == ("failed", "child_killed")
    assert job.error["code"] == "child_killed"
    assert "SIGKILL" in job.error["message"]
    assert "last words" in job.error["log_tail"]
    assert job_of(database, second).status == "succeeded"


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (["memory"], "oom"),
        (["fail", "nonfinite_loss", "the loss is NaN"], "nonfinite_loss"),
        (["exit", 7], "child_crashed"),
        (["kill", 11], "child_killed"),
        (["kill", 15], "child_killed"),
    ],
    ids=["memory", "run error", "exit code", "segfault", "foreign sigterm"],
)
def test_a_child_that_fails_gives_its_job_the_reason(desk, database, step, reason):
    job_id = submit(database, step)
    desk.ring()
    job = job_of(database, job_id)
    assert (job.status, job.status_reason) == ("failed", reason)


@pytest.mark.parametrize("others", [["hang"], ["fail", "failed", "RuntimeError: connection reset by peer"]])
def test_a_rank_that_fails_alone_ends_the_job_with_its_reason(desk, database, others):
    """The others wait for it, or say that it is gone."""
    job_id = submit(database, ["metrics", 1, 2], ["fail_as_a_rank", "oom", "no room for 8 EiB"], others)
    desk.ring()
    job = job_of(database, job_id)
    assert (job.status, job.status_reason, job.error["message"]) == ("failed", "oom", "no room for 8 EiB")
    assert rewards(database, job_id) == [1, 2]


def test_of_ranks_that_do_not_report_the_first_to_fail_has_the_reason(desk, database):
    full, lost = "OSError: [Errno 28] No space left on device", "RuntimeError: Connection closed by peer"
    job_id = submit(database, *(["fail_as_a_rank", "failed", text] for text in (full, lost, lost)), ["hang"])
    desk.ring()
    assert job_of(database, job_id).error["message"] == full


@pytest.mark.parametrize("own_code", [False, True])
def test_a_rank_that_fails_because_the_reporting_one_is_gone_hides_no_reason(desk, database, own_code):
    """Unless it has more to say than that."""
    lost = ["fail_as_a_rank", "oom" if own_code else "failed", "RuntimeError: Connection closed by peer"]
    full = ["fail", "failed", "OSError: [Errno 28] No space left on device"]
    job_id = submit(database, ["metrics", 1, 2], ["after_all", [lost]], full)
    desk.ring()
    job = job_of(database, job_id)
    assert (job.status, job.status_reason) == ("failed", lost[1])
    assert job.error["message"] == (lost if own_code else full)[2]


@pytest.mark.parametrize("failure", [[], [["fail", "hub_unavailable", "the hub is away"]]], ids=["done", "failed"])
def test_a_child_that_stays_after_its_last_word_frees_its_worker(desk, database, failure):
    job_id = submit(database, ["metrics", 1, 2], ["linger", 600], ["spawn"], *failure)
    started = time.monotonic()
    desk.ring()
    assert time.monotonic() - started < 30
    job = job_of(database, job_id)
    assert (job.status, job.status_reason) == (("failed", "hub_unavailable") if failure else ("succeeded", None))
    assert not attempt_processes(f"{job_id}:1")


def test_a_checkpoint_that_is_long_to_read_keeps_its_lease(desk, database, settings, monkeypatch):
    job_id = submit(database, ["checkpoint", 5], ["once", str(settings.data_dir / "again"), [["kill", 9]]])
    beats = []
    monkeypatch.setattr(claims, "heartbeat", lambda *given: beats.append(given[1]))
    monkeypatch.setattr("workers.tasks.damaged_checkpoints", lambda folders: wait_for(lambda: beats) or [])
    desk.ring()
    assert beats[0] == job_id


def test_a_checkpoint_that_cannot_be_read_fails_the_job_and_stays_with_its_rows(desk, database, settings):
    """And the job goes on from it once it can be."""
    left = ["once", str(settings.data_dir / "left"), [["metrics", 1, 5], ["checkpoint", 5], ["kill", 9]]]
    job_id = submit(database, left, ["metrics", 6, 7])
    desk.ring()
    manifest = next(settings.artifacts_dir.rglob("manifest.json"))
    manifest.rename(settings.data_dir / "kept")
    manifest.symlink_to("/proc/self/mem")  # reading it is an input/output error
    retry(database, job_id)
    desk.ring()
    job = job_of(database, job_id)
    assert (job.status, job.status_reason) == ("failed", "checkpoint_missing")
    assert "Input/output error" in job.error["message"]
    assert str(manifest.parent) in job.error["message"]
    assert (rewards(database, job_id), checkpoints(database, job_id)) == ([1, 2, 3, 4, 5], [5])
    manifest.unlink()
    (settings.data_dir / "kept").rename(manifest)
    retry(database, job_id)
    desk.ring()
    assert job_of(database, job_id).status == "succeeded"
    assert (rewards(database, job_id), checkpoints(database, job_id)) == ([1, 2, 3, 4, 5, 6, 7], [5])


def retry(database, job_id) -> None:
    with database.write() as session:
        jobs.retry_job(session, job_id)


def test_a_second_bell_for_a_job_is_harmless(desk, database, settings, stopping):
    job_id = submit(database, ["metrics", 1, 3], ["sleep", 0.5])
    other = Desk(settings, "worker-b", stopping)
    threads = [in_background(desk), in_background(desk), in_background(other)]
    for thread in threads:
        thread.join(20)
    assert (job_of(database, job_id).status, job_of(database, job_id).attempt) == ("succeeded", 1)
    assert desk.ring() == other.ring() == 0


def test_cancel_writes_a_checkpoint_and_ends_the_job(desk, database):
    job_id = submit(database, ["metrics", 1, 2], ["wait_stop"])
    thread = in_background(desk)
    wait_for(lambda: job_of(database, job_id).status == "running")
    with database.write() as session:
        jobs.request_cancel(session, job_id, "checkpoint")
    thread.join(10)
    assert job_of(database, job_id).status == "cancelled"
    assert checkpoints(database, job_id) == [90]


def test_cancel_of_a_deaf_child_kills_it_and_what_it_started(desk, database):
    job_id = submit(database, ["spawn"], ["metrics", 1, 2], ["hang"])
    thread = in_background(desk)
    wait_for(lambda: job_of(database, job_id).status == "running")
    wait_for(lambda: len(attempt_processes(f"{job_id}:1")) == 3)
    with database.write() as session:
        jobs.request_cancel(session, job_id, "now")
    started = time.monotonic()
    thread.join(10)
    assert time.monotonic() - started < 5
    assert job_of(database, job_id).status == "cancelled"
    assert not attempt_processes(f"{job_id}:1")


def test_pause_and_resume_go_on_from_the_checkpoint(desk, database, tmp_path):
    marker = str(tmp_path / "first time")
    job_id = submit(database, ["once", marker, [["metrics", 1, 3], ["wait_stop"]]], ["metrics", 91, 92])
    thread = in_background(desk)
    wait_for(lambda: job_of(database, job_id).status == "running")
    with database.write() as session:
        jobs.request_pause(session, job_id)
    thread.join(10)
    assert job_of(database, job_id).status == "paused"
    assert desk.ring() == 0
    with database.write() as session:
        jobs.resume_job(session, job_id)
    assert desk.ring() == 1
    job = job_of(database, job_id)
    assert (job.status, job.attempt) == ("succeeded", 2)
    assert rewards(database, job_id) == [1, 2, 3, 91, 92]


def test_a_worker_that_leaves_puts_its_job_back_uncounted(desk, database, stopping, settings):
    job_id = submit(database, ["metrics", 1, 2], ["wait_stop"], max_retries=0)
    thread = in_background(desk)
    wait_for(lambda: job_of(database, job_id).status == "running")
    stopping.set()
    thread.join(10)
    job = job_of(database, job_id)
    assert job.status == "queued"
    assert checkpoints(database, job_id) == [90]
    assert not attempt_processes(f"{job_id}:1")


def test_the_time_limit_ends_a_job(desk, database):
    job_id = submit(database, ["metrics", 1, 1], ["hang"], time_limit_seconds=0.5)
    desk.ring()
    job = job_of(database, job_id)
    assert (job.status, job.status_reason) == ("failed", "timeout")


def test_a_flood_of_output_is_bounded_and_the_job_goes_on(desk, database, settings):
    job_id = submit(database, ["flood", 3_000_000], ["metrics", 1, 1])
    desk.ring()
    assert job_of(database, job_id).status == "succeeded"
    assert 0 < len(read_log(database, job_id)) <= settings.log_bytes_per_job + 1000


def test_a_silent_worker_loses_its_job_and_a_sweeper_puts_it_back(settings, database, desk):
    job_id = submit(database, ["metrics", 1, 1])
    with database.write() as session:
        claim = claims.claim_next(session, queues=["default"], worker_id="dead", lease_seconds=settings.lease_seconds)
    assert claim.job_id == job_id
    rung = []
    sweeper = Sweeper(settings, "worker-b", rung.append)
    started = time.monotonic()
    wait_for(lambda: sweeper.step() or job_of(database, job_id).status == "queued", 10)
    assert time.monotonic() - started > settings.lease_seconds
    assert job_id in rung
    assert desk.ring() == 1
    assert (job_of(database, job_id).status, job_of(database, job_id).attempt) == ("succeeded", 2)


def test_a_job_without_a_bell_is_rung_again(settings, database):
    job_id = submit(database, ["metrics", 1, 1])
    rung = []
    sweeper = Sweeper(settings, "worker-b", rung.append)
    wait_for(lambda: sweeper.step() or rung, 5)
    assert rung[0] == job_id


def test_the_poll_runs_a_job_that_no_bell_announced(settings, database, desk):
    job_id = submit(database, ["metrics", 1, 1])
    threading.Thread(target=desk.poll_until_stopped, daemon=True).start()
    wait_for(lambda: job_of(database, job_id).status == "succeeded")


def test_a_fenced_attempt_is_ended_and_writes_nothing_more(settings, database, desk):
    job_id = submit(database, ["metrics", 1, 2], ["hang"])
    thread = in_background(desk)
    wait_for(lambda: job_of(database, job_id).status == "running")
    with database.write() as session:
        claims.expire_attempt(session, job_id, 1)
        claims.claim_next(session, queues=["default"], worker_id="b", lease_seconds=settings.lease_seconds)
    thread.join(10)
    assert not thread.is_alive()
    job = job_of(database, job_id)
    assert (job.attempt, job.status) == (2, "starting")
    assert not attempt_processes(f"{job_id}:1")


def test_a_child_and_what_it_started_die_with_a_supervisor_that_is_killed(settings, database):
    code = (
        "import threading; from service.settings import Settings; from workers.tasks import Desk;"
        "Desk(Settings(), 'w', threading.Event()).ring()"
    )
    job_id = submit(database, ["spawn"], ["metrics", 1, 2], ["hang"])
    environment = os.environ | {
        "ERPO_DATA_DIR": str(settings.data_dir),
        "ERPO_CHILD_COMMAND": json.dumps(settings.child_command),
    }
    worker = subprocess.Popen([sys.executable, "-c", code], env=environment)
    wait_for(lambda: job_of(database, job_id).status == "running")
    wait_for(lambda: len(attempt_processes(f"{job_id}:1")) == 3)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    wait_for(lambda: not attempt_processes(f"{job_id}:1"), 5)


def test_the_attempts_of_a_run_keep_no_more_checkpoints_together_than_it_may_have(desk, database, settings):
    again = str(settings.data_dir / "again")
    steps = [["checkpoint", step] for step in (1, 2, 3, 4)]
    with database.write() as session:
        script = [["once", again, [*steps, ["wait_stop"]]], ["checkpoint", 91]]
        spec = {"model": "tiny", "save_total_limit": 2, "script": script}
        job_id = create_job(session, kind="train", spec=spec, options={}).id
    worker = in_background(desk)
    wait_for(lambda: checkpoints(database, job_id) == [1, 2, 3, 4])
    with database.write() as session:
        jobs.request_pause(session, job_id)
    worker.join(20)
    assert checkpoints(database, job_id) == [4, 90]
    with database.write() as session:
        jobs.resume_job(session, job_id)
    desk.ring()
    assert checkpoints(database, job_id) == [90, 91]
    folder = settings.artifacts_dir / "runs" / job_of(database, job_id).run_id
    assert sorted(path.name for path in folder.glob("*/step-*")) == ["step-90", "step-91"]


def test_room_that_was_not_made_changes_no_outcome_and_is_made_at_the_next_claim(desk, database, settings, monkeypatch):
    def is_away(*_):
        raise ConnectionError("the database is away")

    first = ["once", str(settings.data_dir / "again"), [["checkpoint", 1], ["checkpoint", 2], ["kill", 9]]]
    with database.write() as session:
        spec = {"model": "tiny", "save_total_limit": 1, "script": [first, ["metrics", 3, 3], ["wait_stop"]]}
        job_id = create_job(session, kind="train", spec=spec, options={}).id
    with monkeypatch.context() as patch:
        patch.setattr("workers.claims.Attempt.remove_checkpoint", is_away)
        desk.ring()
    assert (job_of(database, job_id).status_reason, checkpoints(database, job_id)) == ("child_killed", [1, 2])
    with database.write() as session:
        jobs.retry_job(session, job_id)
    worker = in_background(desk)
    wait_for(lambda: job_of(database, job_id).status == "running")
    assert checkpoints(database, job_id) == [2]
    with database.write() as session:
        jobs.request_cancel(session, job_id, "now")
    worker.join(20)
    assert job_of(database, job_id).status == "cancelled"
