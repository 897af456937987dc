"""Training with vLLM as the sampler, on a tiny model: the engine follows the adapter, or the run ends."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Olmo2Config, Qwen3MoeConfig

from erpo_core.errors import RunError
from erpo_core.generation.vllm import VLLMEngine
from erpo_core.job import JobInputs, ModelInput
from erpo_core.launch import launcher
from erpo_core.models import load_policy
from erpo_core.records import Metrics, Resolved
from erpo_core.specs import parse_spec
from erpo_core.trainer.run import run_training
from tiny_model import make_tiny_model

pytestmark = pytest.mark.timeout(300)
SUMS = "reasoning-gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1&size=16&seed=3"


class Sink:
    requested = False

    def __init__(self) -> None:
        self.records = []

    def emit(self, record) -> None:
        self.records.append(record)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", hidden_size=128)


def run(tiny: Path, folder: Path, **more) -> list:
    """The records of a training of two steps."""
    body = {
        "model": str(tiny),
        "dataset": SUMS,
        "rewards": [{"name": "boxed_format", "weight": 0.1}, {"name": "regex", "args": {"pattern": "[a-m]"}}],
        "outcome_reward": "regex",
        "num_generations": 4,
        "generation_batch_size": 8,
        "max_completion_length": 12,
        "max_length": 400,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "lora": {"r": 4, "lora_alpha": 8},
        "use_vllm": True,
        **more,
    }
    return trained(tiny, folder, body)


def trained(model: Path, folder: Path, body: dict) -> list:
    """The records of a training of ``model``."""
    inputs = JobInputs(
        job_id="job_1",
        run_id="run_1",
        attempt=1,
        work_dir=folder / "work",
        cache_dir=folder / "cache",
        model=ModelInput(str(model)),
        model_roots=(model.parent,),
    )
    sink = Sink()
    run_training(parse_spec("train", body), inputs, sink, sink)
    return sink.records


def steps_of(records: list) -> list[dict]:
    """The metrics of each step."""
    return [record.values for record in records if isinstance(record, Metrics) and "reward" in record.values]


@pytest.fixture
def train(tiny, tmp_path):
    return lambda **more: run(tiny, tmp_path, **more)


def test_the_engine_samples_from_the_policy_of_each_step(train, monkeypatch):
    digests = []
    told = VLLMEngine.adapter_digest
    monkeypatch.setattr(VLLMEngine, "adapter_digest", lambda self: digests.append(told(self)) or digests[-1])
    records = train(max_steps=3)
    assert next(record for record in records if isinstance(record, Resolved)).data["config"]["use_vllm"] is True
    steps = steps_of(records)
    assert len(steps) == len(set(digests)) == 3
    for values in steps:
        assert 0 < values["sampling/logp_difference_mean"] <= values["sampling/logp_difference_max"] < 1e-3
        assert values["grad_norm"] > 0


def test_every_weight_is_trained_and_the_engine_follows(train):
    steps = steps_of(train(max_steps=3, lora=None, learning_rate=1e-3))
    assert len(steps) == 3
    for values in steps:
        assert 0 < values["sampling/logp_difference_mean"] <= values["sampling/logp_difference_max"] < 1e-3
        assert values["grad_norm"] > 0
    assert steps[2]["kl"] > 1e-6


def test_a_step_on_the_weights_of_the_step_before_is_refused(train, monkeypatch):
    load, loaded = VLLMEngine.load_weights, []

    def load_the_first(self, folder) -> None:
        if not loaded:
            load(self, folder)
        loaded.append(folder)

    monkeypatch.setattr(VLLMEngine, "load_weights", load_the_first)
    with pytest.raises(RunError, match="answers as the version before does, not as version 2 of the weights") as caught:
        train(lora=None)
    assert caught.value.code == "stale_adapter"
    assert len(loaded) == 2


def like(tiny: Path, folder: Path, config_type: type, **changes) -> Path:
    """The tiny model's sizes and tokenizer with random weights of another family."""
    shape = json.loads((tiny / "config.json").read_text())
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: shape[name] for name in (*names, "num_key_value_heads", "eos_token_id", "pad_token_id")}
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*config.json", "*.safetensors"))
    config = config_type(**sizes, bos_token_id=None, max_position_embeddings=4096, **changes)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    shutil.copy(tiny / "tokenizer_config.json", folder)
    return folder


def test_a_family_that_vllm_takes_from_transformers_is_trained(tiny, tmp_path):
    steps = steps_of(run(like(tiny, tmp_path / "olmo2", Olmo2Config), tmp_path))
    assert len(steps) == 2
    assert all(values["sampling/logp_difference_max"] < 1e-3 for values in steps)


def test_the_experts_of_a_model_that_is_trained_whole_follow(tiny, tmp_path):
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()  # an engine without experts leaves this process no group for them
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "initializer_range": 0.2}
    mixture = like(tiny, tmp_path / "mixture", Qwen3MoeConfig, head_dim=32, **experts)
    steps = steps_of(run(mixture, tmp_path, lora=None, learning_rate=1e-3, max_steps=3))
    assert len(steps) == 3
    assert all(values["sampling/logp_difference_max"] < 1e-3 for values in steps)


def test_the_policy_is_evaluated_by_the_same_engine_and_training_is_as_without(train):
    evaluated = {"eval_every": 2, "eval_benchmarks": [SUMS], "eval_num_samples": 2}
    runs = {name: train(preflight=False, **more) for name, more in (("with", evaluated), ("without", {}))}
    metrics = {name: [one for one in records if isinstance(one, Metrics)] for name, records in runs.items()}
    evaluations = [one for one in metrics["with"] if "eval/chain_sum/acc" in one.values]
    assert [one.step for one in evaluations] == [0, 2]
    assert evaluations[0].values["eval/chain_sum/mean_length"] > 0
    rewards = {
        name: [(one.values["reward"], one.values["grad_norm"]) for one in found if "reward" in one.values]
        for name, found in metrics.items()
    }
    assert rewards["with"] == rewards["without"]


def test_the_difference_from_the_engine_can_be_corrected_token_by_token(train):
    records = train(vllm_importance_sampling_correction=True)
    steps = steps_of(records)
    assert len(steps) == 2
    for values in steps:
        low, mean, high = (values[f"sampling/importance_sampling_ratio/{name}"] for name in ("min", "mean", "max"))
        assert 0.99 < low < mean < high < 1.01
        assert values["sampling/importance_sampling_ratio/clipped"] == 0


def test_a_step_on_the_adapter_of_the_step_before_is_refused(train, tmp_path, monkeypatch):
    load, first = VLLMEngine.load_adapter, tmp_path / "first"

    def load_the_first(self, folder) -> None:
        if not first.exists():
            shutil.copytree(folder, first)
        load(self, first)

    monkeypatch.setattr(VLLMEngine, "load_adapter", load_the_first)
    with pytest.raises(RunError, match="version 2") as caught:
        train()
    assert caught.value.code == "stale_adapter"


def test_a_base_that_was_changed_in_memory_is_refused(train, monkeypatch):
    def load_another(*args, **kwargs):
        model, *rest = load_policy(*args, **kwargs)
        merged = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        return merged.merge_and_unload(), *rest

    monkeypatch.setattr("erpo_core.trainer.run.load_policy", load_another)
    with pytest.raises(RunError, match="changed in memory") as caught:
        train()
    assert caught.value.code == "stale_adapter"


ADAPTER, WHOLE = {}, {"lora": None, "learning_rate": 1e-3}


@pytest.mark.parametrize("more", [pytest.param(ADAPTER, id="adapter"), pytest.param(WHOLE, id="every weight")])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_each_rank_samples_its_share_with_an_engine_of_its_own(tiny, tmp_path, strategy, more):
    script = Path(__file__).with_name("ranks_vllm_script.py")
    paths = os.pathsep.join(str(Path(__file__).parents[up]) for up in (0, 1, 2))
    done = subprocess.run(
        [sys.executable, *launcher(strategy, 2), str(script), str(tiny), str(tmp_path), strategy, json.dumps(more)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-9000:]
    steps = json.loads((tmp_path / "metrics.json").read_text())
    assert len(steps) == 2
    for values in steps:
        assert 0 < values["sampling/logp_difference_mean"] <= values["sampling/logp_difference_max"] < 1e-3
        assert values["grad_norm"] > 0
