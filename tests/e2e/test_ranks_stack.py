"""Two processes train one model (gloo on the CPU), ordered, paused, resumed and cancelled through the API."""

import signal

import pytest
from test_stack import EVALUATED, SPEC, wait_for

from service.client import ErpoClient

pytestmark = pytest.mark.timeout(300)


def ranks(stack) -> list[str]:
    return [p.environ()["RANK"] for p in stack.processes() if "LOCAL_RANK" in p.environ() and p.status() != "zombie"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_two_processes_train_one_model_and_leave_together(stack, model_root, strategy):
    two = SPEC | {"hardware": {"num_gpus": 2, "strategy": strategy}, "trace_every": 0} | EVALUATED
    stack.start()
    with ErpoClient(stack.url) as client:
        job = client.train(model=str(model_root / "tiny"), **two | {"max_steps": 40})
        wait_for(lambda: client.runs.checkpoints(job.run_id)["data"], 120, stack)
        assert {"0", "1"} <= set(ranks(stack))
        client.jobs.pause(job.id)
        wait_for(lambda: client.jobs.get(job.id)["status"] == "paused", 60, stack)
        assert ranks(stack) == []
        series = client.runs.metrics(job.run_id)["series"]
        done = series["reward"]["step"]
        assert series["eval/chain_sum/acc"]["step"][0] == 0
        assert done == list(range(1, len(done) + 1))
        assert max(row["step"] for row in client.runs.checkpoints(job.run_id)["data"]) == done[-1] < 40
        client.jobs.resume(job.id)
        wait_for(lambda: len(client.runs.metrics(job.run_id)["series"]["reward"]["step"]) > len(done), 120, stack)
        client.jobs.cancel(job.id, mode="now")
        wait_for(lambda: client.jobs.get(job.id)["is_terminal"], 60, stack)
        assert ranks(stack) == []
    assert stack.stop(signal.SIGTERM) == []


def test_where_the_process_that_saves_cannot_the_job_says_why_and_not_that_the_other_lost_it(stack, model_root):
    two = SPEC | {"hardware": {"num_gpus": 2, "strategy": "ddp"}, "trace_every": 0}
    stack.start()
    with ErpoClient(stack.url) as client:
        job = client.train(model=str(model_root / "tiny"), **two)
        place = stack.data_dir / "artifacts" / "runs" / job.run_id / "attempt-1" / "checkpoints" / "checkpoint-1"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("a file, where the checkpoint is to be a folder")
        job.wait(timeout=180)
        error = client.jobs.get(job.id)["error"]
        assert error["message"].startswith("NotADirectoryError"), stack.said()
        wait_for(lambda: ranks(stack) == [], 5, stack)
