"""The real stack: Valkey, uvicorn, Celery, SQLite, and a real training of a tiny model of random weights."""

import signal
import time

import pytest

from service.client import ErpoClient

pytestmark = pytest.mark.timeout(240)

SPEC = {
    "dataset": "reasoning-gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1&size=16&seed=3",
    "num_generations": 4,
    "generation_batch_size": 8,
    "max_completion_length": 12,
    "max_length": 400,
    "max_steps": 2,
    "preflight": False,  # random weights box nothing
    "save_steps": 1,
    "trace_every": 1,
    "learning_rate": 1e-3,
    "lora": {"r": 4, "lora_alpha": 8},
}
EVALUATED = {"eval_every": 2, "eval_benchmarks": [SPEC["dataset"]], "eval_num_samples": 2}


def wait_for(condition, seconds: float, stack) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, stack.said()
        time.sleep(0.1)


def test_a_tiny_model_is_trained_evaluated_and_analysed_through_the_api(stack, model_root):
    stack.start()
    with ErpoClient(stack.url) as client:
        seen = []
        job = client.train(model=str(model_root / "tiny"), **SPEC | EVALUATED)
        job.wait(on_event=seen.append, timeout=180)
        assert job.status == "succeeded", stack.said()
        assert {"job.status", "metric.batch", "checkpoint.created"} <= {event["type"] for event in seen}
        assert_run_is_readable(client, job.run_id)
        adapter = {"run": job.run_id, "checkpoint": "last"}
        evaluation = client.evaluate(
            model=adapter,
            dataset=SPEC["dataset"],
            limit=2,
            num_samples=2,
            pass_at=[1, 2],
            sampling={"max_completion_length": 8},
        )
        evaluation.wait(timeout=120)
        assert evaluation.status == "succeeded", stack.said()
        result = client.evaluations.get(evaluation.run_id)["result"]
        assert (result["num_problems"], result["num_samples"]) == (2, 2)
        assert 0 <= result["acc"]["value"] <= 1
        analysis = client.analyze_entropy(model=adapter, texts=[{"prompt": "1 + 1?", "response": "It is 2."}])
        analysis.wait(timeout=120)
        assert analysis.status == "succeeded", stack.said()
        tokens = client.entropy.tokens(analysis.run_id, 0, channels="entropy,logp")
        assert len(tokens["channels"]["entropy"]) == len(tokens["tokens"]) > 0
    assert stack.stop(signal.SIGINT) == []
    assert stack.process.returncode == 0
    assert not (stack.data_dir / "server.json").exists()


def test_a_job_that_can_learn_nothing_fails_before_its_first_step_and_says_why(stack, model_root):
    stack.start()
    with ErpoClient(stack.url) as client:
        job = client.train(model=str(model_root / "tiny"), **SPEC | {"preflight": True})
        job.wait(timeout=180, raise_on_failure=False)
        found = client.jobs.get(job.id)
        assert (found["status"], found["status_reason"]) == ("failed", "preflight_failed")
        assert "no answer is boxed" in found["error"]["message"]
        assert client.runs.metrics(job.run_id)["series"] == {}


def assert_run_is_readable(client: ErpoClient, run_id: str) -> None:
    series = client.runs.metrics(run_id)["series"]
    assert series["reward"]["step"] == [1, 2]
    assert series["eval/chain_sum/acc"]["step"] == [0, 2]
    assert "entropy" in series
    completions = client.runs.completions(run_id)["data"]
    assert len(completions) == 16
    checkpoints = client.runs.checkpoints(run_id)["data"]
    assert sorted(row["step"] for row in checkpoints) == [1, 2]
    sequences = client.runs.traces(run_id)["data"]
    assert len(sequences) >= 4
    tokens = client.runs.trace_tokens(run_id, sequences[0]["n"])
    assert len(tokens["token_ids"]) == sequences[0]["num_tokens"]
    assert {"entropy", "logp", "advantage"} <= set(tokens["channels"])


def test_killing_the_parent_leaves_no_process_and_the_job_goes_on_afterwards(stack, model_root):
    stack.start()
    with ErpoClient(stack.url) as client:
        job = client.train(model=str(model_root / "tiny"), **SPEC | {"max_steps": 60, "trace_every": 0})
        wait_for(lambda: client.runs.checkpoints(job.run_id)["data"], 90, stack)
    assert stack.stop(signal.SIGKILL, 15) == []
    stack.start()
    with ErpoClient(stack.url) as client:
        wait_for(lambda: client.jobs.get(job.id)["attempt"] == 2, 60, stack)
        client.jobs.cancel(job.id)
        wait_for(lambda: client.jobs.get(job.id)["is_terminal"], 60, stack)
        steps = client.runs.metrics(job.run_id)["series"]["reward"]["step"]
        assert steps == sorted(set(steps))
    assert stack.stop(signal.SIGTERM) == []
