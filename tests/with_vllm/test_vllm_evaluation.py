"""Several adapters of one base in one evaluation through vLLM, on a tiny model: hot-loaded, answering as each alone."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from erpo_core import evaluation_model
from erpo_core.evaluation import run_evaluation
from erpo_core.generation.vllm import VLLMEngine
from erpo_core.job import JobInputs, ModelInput
from erpo_core.models import load_model
from erpo_core.records import Completions, Resolved, Result
from erpo_core.specs.evaluate import EvaluateSpec
from tiny_model import make_tiny_model

pytestmark = pytest.mark.timeout(600)
SUMS = "reasoning-gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1&size=6&seed=3"


class Sink:
    def __init__(self, stop_after: int | None = None) -> None:
        self.records, self.stop_after = [], stop_after

    def emit(self, record) -> None:
        self.records.append(record)

    @property
    def requested(self) -> bool:
        stored = sum(isinstance(record, Completions) for record in self.records)
        return self.stop_after is not None and stored >= self.stop_after

    def by_run(self) -> dict[str, dict]:
        found: dict[str, dict] = {}
        for record in self.records:
            if isinstance(record, Resolved):
                found[record.run_id] = {"adapter": record.data["adapter_digest"], "rows": []}
            if isinstance(record, Completions):
                found[record.run_id]["rows"] += record.rows
            if isinstance(record, Result):
                found[record.run_id]["result"] = record.data
        return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", hidden_size=128)


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """What a job is given for two adapters of different ranks."""
    found = []
    for rank in (4, 16):
        torch.manual_seed(rank)
        model, _ = load_model(tiny, dtype=torch.float32)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False)
        folder = tmp_path_factory.mktemp("adapter")
        get_peft_model(model, config).save_pretrained(folder)
        model = ModelInput(str(tiny), folder)
        found.append(JobInputs("job", f"run_{rank}", 1, folder, folder, model, model_roots=(tiny.parent,)))
    return found


def evaluate(runs, sink: Sink) -> dict:
    body = {"model": "tiny", "dataset": SUMS, "engine": "vllm", "num_samples": 4, "batch_size": 8}
    spec = EvaluateSpec.model_validate(body | {"sampling": {"max_completion_length": 16, "seed": 2}})
    return run_evaluation(spec, replace(runs[0], also=tuple(runs[1:])), sink, sink)


def test_adapters_are_loaded_into_one_engine_and_answer_as_each_alone(runs, monkeypatch):
    alone: dict[str, dict] = {}
    for run in runs:
        sink = Sink()
        evaluate([run], sink)
        alone |= sink.by_run()
    opened, loaded = [], []
    open_vllm, load_adapter = evaluation_model.open_vllm, VLLMEngine.load_adapter
    monkeypatch.setattr(evaluation_model, "open_vllm", lambda *a, **k: opened.append(1) or open_vllm(*a, **k))
    monkeypatch.setattr(VLLMEngine, "load_adapter", lambda self, f: loaded.append(f) or load_adapter(self, f))
    stopped, rest = Sink(stop_after=4), Sink()
    assert evaluate(runs, stopped) == {"stopped": True}
    assert (len(opened), loaded) == (1, [run.model.adapter_path for run in runs])
    part = stopped.by_run()
    assert [len(part[run.run_id]["rows"]) for run in runs] == [24, 8]
    evaluate([replace(run, stored_rows=tuple(part[run.run_id]["rows"])) for run in runs], rest)
    assert loaded[2:] == [runs[1].model.adapter_path], "the first run has all of its answers"
    for name, one in rest.by_run().items():
        assert one["result"] == alone[name]["result"]
        rows = part[name]["rows"] + one["rows"]
        assert sorted(rows, key=lambda row: (row["prompt_id"], row["sample"])) == sorted(
            alone[name]["rows"], key=lambda row: (row["prompt_id"], row["sample"])
        )
    assert len({one["adapter"] for one in alone.values()}) == 2
