"""Several checkpoints of one training in one evaluation, through the API; a killed child generates nothing twice."""

import signal

import pytest
from test_stack import SPEC, wait_for

from service.client import ErpoClient

pytestmark = pytest.mark.timeout(300)
EVALUATION = {
    "dataset": SPEC["dataset"],
    "num_samples": 2,
    "batch_size": 2,
    "sampling": {"max_completion_length": 12, "seed": 4},
}


def answers(client: ErpoClient, run_id: str) -> list[tuple]:
    rows = client.runs.completions(run_id, limit=200)["data"]
    return sorted((row["prompt_id"], row["sample"], row["completion"], row["verdict"]) for row in rows)


def test_checkpoints_are_evaluated_on_one_base_and_a_killed_job_goes_on(stack, model_root):
    stack.start()
    with ErpoClient(stack.url) as client:
        training = client.train(model=str(model_root / "tiny"), **SPEC).wait(timeout=180).run_id
        alone = client.evaluate(model={"run": training, "checkpoint": 2}, **EVALUATION).wait(timeout=120).run_id
        job = client.evaluate(model={"run": training, "checkpoints": [1, "last"]}, **EVALUATION, job={"max_retries": 0})
        first, second = job.run_ids
        wait_for(lambda: answers(client, second), 120, stack)
        assert client.evaluations.get(first)["result"] is not None, "the first checkpoint's numbers are there already"
        child = min(
            (process for process in stack.processes() if process.environ().get("ERPO_ATTEMPT") == f"{job.id}:1"),
            key=lambda process: process.create_time(),
        )
        child.kill()
        wait_for(lambda: job.refresh().is_terminal, 60, stack)
        assert (job.status, job.data["status_reason"]) == ("failed", "child_killed")
        before = answers(client, first), answers(client, second)
        assert (len(before[0]), 0 < len(before[1]) < 32) == (32, True)
        assert job.retry().wait(timeout=180).status == "succeeded", stack.said()
        assert answers(client, first) == before[0]
        assert answers(client, second) == answers(client, alone)
        assert set(before[1]) < set(answers(client, second))
        results = [client.evaluations.get(run)["result"] for run in (first, second, alone)]
        assert results[1] == results[2]
        compared = client.evaluations.compare([first, second])["benchmarks"][0]
        assert compared["num_problems"] == 16
        assert [row["model"] for row in compared["evaluations"]] == [f"{training} @ 1", f"{training} @ last"]
        again = client.job(client.evaluations.verify(second)["id"]).wait(timeout=120)
        assert client.evaluations.get(again.run_id)["result"] == results[1]
        assert answers(client, again.run_id) == answers(client, second)
    assert stack.stop(signal.SIGTERM) == []
