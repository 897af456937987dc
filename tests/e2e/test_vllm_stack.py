"""The real stack with the real vLLM: SmolLM2 and a trained adapter over HTTP, and what a killed child leaves."""

import importlib.util
import time
from contextlib import suppress

import psutil
import pytest

from service.client import ErpoClient

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="`make test-vllm` installs vLLM"),
]
SUMS = "reasoning-gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1&size=16&seed=3"
PROMPT = {
    "worked_examples": [
        {"problem": "What is 4 + 3?", "solution": "4 + 3 = 7. The answer is \\boxed{7}."},
        {"problem": "What is 9 - 5?", "solution": "9 - 5 = 4. The answer is \\boxed{4}."},
    ]
}
EVALUATION = {
    "dataset": SUMS,
    "prompt": PROMPT,
    "engine": "vllm",
    "limit": 8,
    "num_samples": 4,
    "pass_at": [1, 2, 4],
    "batch_size": 8,
    "sampling": {"max_completion_length": 24, "seed": 11},
}
TRAINING = {
    "dataset": SUMS,
    "prompt": PROMPT,
    "use_vllm": True,
    "num_generations": 4,
    "generation_batch_size": 8,
    "max_completion_length": 24,
    "max_length": 300,
    "max_steps": 2,
    "warmup_steps": 0,
    "learning_rate": 1e-3,
    "lora": {"r": 8, "lora_alpha": 16},
    "rewards": [
        {"name": "accuracy"},
        {"name": "boxed_format", "weight": 0.2},
        {"name": "length_penalty", "args": {"max_completion_len": 24, "soft_punish_cache": 12}},
    ],
}


@pytest.fixture(scope="module")
def client(shared_stack):
    with ErpoClient(shared_stack.url) as client:
        yield client


def evaluate(client, stack, model) -> dict:
    """The run of an evaluation through vLLM, its result and its answers, by problem and sample."""
    job = client.evaluate(model=model, **EVALUATION).wait(timeout=600)
    assert job.status == "succeeded", stack.said()
    return outcome(client, job.run_id)


def outcome(client, run_id: str) -> dict:
    rows = client.runs.completions(run_id, limit=100)["data"]
    return {
        "result": client.evaluations.get(run_id)["result"],
        "answers": sorted((row["prompt_id"], row["sample"], row["completion"]) for row in rows),
    }


@pytest.fixture(scope="module")
def base(client, shared_stack):
    return evaluate(client, shared_stack, "smollm2-135m")


def attempts(stack) -> dict[str, list[psutil.Process]]:
    """The processes of each attempt that is alive, the oldest first."""
    found: dict[str, list[psutil.Process]] = {}
    for process in sorted(stack.processes(), key=lambda process: process.create_time()):
        with suppress(psutil.Error):
            if mark := process.environ().get("ERPO_ATTEMPT"):
                found.setdefault(mark, []).append(process)
    return found


def wait_for(condition, seconds: float, stack) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, stack.said()
        time.sleep(0.05)


def test_the_base_model_is_evaluated_through_vllm(base, shared_stack):
    result = base["result"]
    assert (result["num_problems"], result["num_samples"], result["num_answers"]) == (8, 4, 32)
    assert 0 < result["acc"]["value"] <= result["fmt"]["value"] <= 1
    assert len(base["answers"]) == 32
    wait_for(lambda: not attempts(shared_stack), 20, shared_stack)


def test_an_adapter_is_trained_and_evaluated_through_vllm(client, shared_stack, base):
    job = client.train(model="smollm2-135m", **TRAINING).wait(timeout=600)
    assert job.status == "succeeded", shared_stack.said()
    series = client.runs.metrics(job.run_id)["series"]
    assert series["sampling/logp_difference_mean"]["step"] == [1, 2]
    assert 0 < max(series["sampling/logp_difference_max"]["value"]) < 1e-2
    trained = evaluate(client, shared_stack, {"run": job.run_id, "checkpoint": "last"})
    assert trained["result"]["num_answers"] == 32
    assert trained["answers"] != base["answers"]
    wait_for(lambda: not attempts(shared_stack), 20, shared_stack)


def test_an_evaluation_whose_child_was_killed_ends_with_the_same_table(client, shared_stack, base):
    job = client.evaluate(model="smollm2-135m", **EVALUATION, job={"max_retries": 0})
    wait_for(lambda: client.runs.completions(job.run_id)["data"], 600, shared_stack)
    attempts(shared_stack)[f"{job.id}:1"][0].kill()
    wait_for(lambda: job.refresh().is_terminal, 60, shared_stack)
    assert (job.status, job.data["status_reason"]) == ("failed", "child_killed")
    wait_for(lambda: not attempts(shared_stack), 20, shared_stack)
    assert 0 < len(client.runs.completions(job.run_id, limit=100)["data"]) < 32
    assert job.retry().wait(timeout=600).status == "succeeded", shared_stack.said()
    assert outcome(client, job.run_id) == base
