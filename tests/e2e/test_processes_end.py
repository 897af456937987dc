"""The running stack around children that follow a script: whatever dies, jobs end once and no process is left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from service.client import ErpoClient

pytestmark = pytest.mark.timeout(300)
CHILD = Path(__file__).parents[1] / "workers" / "scripted_child.py"
HANG = [["spawn"], ["metrics", 1, 2], ["hang"]]


def obey(stack, *script) -> None:
    """What every child of the stack does from now on."""
    path = stack.data_dir.with_suffix(".script")
    path.write_text(json.dumps(script))
    stack.environment |= {"ERPO_CHILD_COMMAND": json.dumps([sys.executable, str(CHILD)]), "ERPO_SCRIPT": str(path)}


@pytest.fixture
def scripted(stack):
    """Start the stack; what every child does is said here."""

    def start(*script) -> ErpoClient:
        obey(stack, *script)
        stack.start()
        return ErpoClient(stack.url)

    return start


@pytest.fixture(scope="module")
def lasting(new_stack):
    """A stack that has outlived whatever the tests before killed in it."""
    stack = new_stack()
    obey(stack, ["metrics", 1, 1])
    yield stack.start()
    assert stack.stop(signal.SIGINT) == []


@pytest.fixture
def client(lasting):
    with ErpoClient(lasting.url) as client:
        yield client


def submit(client: ErpoClient, model_root: Path, **options):
    texts = [{"prompt": "1 + 1?", "response": "2"}]
    return client.analyze_entropy(model=str(model_root / "tiny"), texts=texts, job=options)


def wait_for(condition, stack) -> None:
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end, stack.said()
        time.sleep(0.05)


def named(stack, *words: str) -> list[psutil.Process]:
    return [process for process in stack.processes() if all(word in " ".join(process.cmdline()) for word in words)]


def test_a_second_service_on_the_same_data_directory_is_refused(lasting):
    second = subprocess.run(
        [sys.executable, "-m", "service.cli.main", "up"],
        env=lasting.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = second.stdout + second.stderr
    assert second.returncode != 0
    assert str(lasting.process.pid) in said
    assert lasting.url in said
    assert "Traceback" not in said


def test_every_process_of_the_stack_carries_the_data_directory(lasting):
    assert {os.path.basename(process.exe()) for process in lasting.processes()} >= {"valkey-server"}
    assert len(lasting.processes()) >= 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_ends_everything_even_a_child_that_is_deaf(scripted, stack, model_root, number):
    with scripted(*HANG) as client:
        job = submit(client, model_root)
        wait_for(lambda: job.refresh().status == "running", stack)
    assert stack.stop(number) == []
    assert stack.process.returncode == 0
    assert not (stack.data_dir / "server.json").exists()
    assert "Traceback" not in (stack.data_dir / "logs" / "worker.log").read_text()


def test_killing_the_parent_leaves_nothing_behind_and_the_next_start_runs_the_job(scripted, stack, model_root):
    with scripted(*HANG) as client:
        job = submit(client, model_root)
        wait_for(lambda: job.refresh().status == "running", stack)
    assert stack.stop(signal.SIGKILL) == []
    with scripted(["metrics", 1, 3]) as client:
        wait_for(lambda: client.jobs.get(job.id)["status"] == "succeeded", stack)
        assert client.jobs.get(job.id)["attempt"] == 2
    assert stack.stop(signal.SIGTERM) == []


def test_a_killed_child_fails_its_job_and_the_next_one_runs(lasting, client, model_root):
    obey(lasting, ["print", "last words"], *HANG)
    first = submit(client, model_root)
    wait_for(lambda: first.refresh().status == "running", lasting)
    for process in named(lasting, "scripted_child"):
        if process.environ().get("ERPO_ATTEMPT") == f"{first.id}:1" and process.parent().name() != process.name():
            process.kill()
            break
    else:
        named(lasting, "scripted_child")[0].kill()
    wait_for(lambda: first.refresh().is_terminal, lasting)
    assert (first.data["status"], first.data["status_reason"]) == ("failed", "child_killed")
    assert "last words" in first.data["error"]["log_tail"]
    obey(lasting, ["metrics", 1, 1])
    assert submit(client, model_root).wait(timeout=90).status == "succeeded"


def test_a_killed_pool_process_loses_its_job_to_the_next_attempt(lasting, client, model_root, tmp_path):
    obey(lasting, ["once", str(tmp_path / "first"), HANG], ["metrics", 1, 1])
    job = submit(client, model_root)
    wait_for(lambda: job.refresh().status == "running", lasting)
    pool = psutil.Process(int(named(lasting, "scripted_child")[0].environ()["ERPO_SUPERVISOR_PID"]))
    pool.kill()
    wait_for(lambda: job.refresh().status == "succeeded", lasting)
    assert job.data["attempt"] == 2


def test_a_killed_broker_or_worker_comes_back_and_jobs_run(lasting, client, model_root):
    obey(lasting, ["metrics", 1, 1])
    named(lasting, "valkey-server")[0].kill()
    assert submit(client, model_root).wait(timeout=90).status == "succeeded"
    named(lasting, "celery")[0].kill()
    assert submit(client, model_root).wait(timeout=90).status == "succeeded"


def test_an_orderly_stop_gives_the_job_back_and_its_checkpoint_is_kept(scripted, stack, model_root, tmp_path):
    with scripted(["once", str(tmp_path / "first"), [["metrics", 1, 2], ["wait_stop"]]], ["metrics", 1, 3]) as client:
        job = submit(client, model_root, max_retries=0)
        wait_for(lambda: job.refresh().status == "running", stack)
    assert stack.stop(signal.SIGINT) == []
    with scripted(["metrics", 1, 3]) as client:
        wait_for(lambda: client.jobs.get(job.id)["is_terminal"], stack)
        assert client.jobs.get(job.id)["status"] == "succeeded"
        assert [row["step"] for row in client.runs.checkpoints(job.run_id)["data"]] == [90]
    assert stack.stop(signal.SIGINT) == []
