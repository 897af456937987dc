"""One update from one batch, however it lies over ranks, micro-batches, generations and shards (gloo on the CPU)."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from erpo_core.checkpoints import is_whole
from erpo_core.launch import launcher
from tiny_model import make_tiny_model

pytestmark = pytest.mark.timeout(900)
SCRIPT = Path(__file__).with_name("ranks_script.py")
ROOT = Path(__file__).parents[2]
METRICS = (
    "reward",
    "reward_std",
    "loss",
    "grad_norm",
    "entropy",
    "entropy/p50",
    "kl",
    "kl/exact",
    "erpo/progress_std",
    "erpo/psi_std",
    "erpo/frac_dead_groups",
    "erpo/frac_silent_buckets",
    "erpo/share_flipped_wrong",
    "erpo/max_abs_advantage",
    "erpo/credit_on_top20_entropy",
    "completions/right_wrong_length_ratio",
)
LORA = {"r": 8, "lora_alpha": 16}


def an_update(name: str, layout: str, **more) -> dict:
    return {"name": name, "kind": "update", "layout": layout, **more}


def an_sft(name: str, lora: dict | None, **hardware) -> dict:
    return {"name": name, "kind": "sft", "lora": lora, "hardware": hardware}


TWO = {"num_gpus": 2}
DEAD = {"judged": "every other prompt", "dynamic_sampling": True}
CASES = {
    "one": [
        an_update("adapter", "16,1,1,erpo,group"),
        an_update("adapter, ema", "16,1,1,erpo,ema"),
        an_update("every weight", "16,1,1,erpo,group", tuning="full"),
        an_update("trained adapter", "16,1,1,erpo,ema", tuning="warm"),
        an_update("unjudged", "4,1,1,erpo,group", judged="half"),
        an_update("dead groups, no KL term", "16,1,1,erpo,group", judged="every other prompt", beta=0.0),
        an_update("one group", "4,1,1,erpo,group"),
        an_update("dead groups", "4,1,1,erpo,group", **DEAD),
        an_update("dead groups of twelve", "12,1,1,erpo,group", **DEAD),
        an_update("micro-batches", "2,8,8,erpo,group"),
        an_sft("sft", LORA),
        an_sft("sft, every weight", None),
    ],
    "ddp": [
        an_update("whole groups", "8,1,1,erpo,group"),
        an_update("micro-batches, ema", "4,2,2,erpo,ema"),
        an_update("groups over micro-batches", "2,4,4,erpo,group"),
        an_update("a group over the ranks", "2,1,1,erpo,group"),
        an_update("dead groups", "2,1,1,erpo,group", **DEAD),
        an_sft("sft", LORA, strategy="ddp", **TWO),
    ],
    "three": [an_update("dead groups of twelve", "4,1,1,erpo,group", **DEAD)],
    "fsdp2": [
        an_update("whole groups", "8,1,1,erpo,group"),
        an_update("groups over micro-batches", "2,4,4,erpo,group"),
        an_update("every weight", "4,2,2,erpo,group", tuning="full", gradient_checkpointing=True),
        an_update("trained adapter", "4,2,2,erpo,ema", tuning="warm"),
        an_update("unjudged", "2,1,1,erpo,group", judged="half"),
        an_update("dead groups, no KL term", "8,1,1,erpo,group", judged="every other prompt", beta=0.0),
        {"name": "resume", "kind": "resume"},
        {"name": "resume, every weight", "kind": "resume", "tuning": "full"},
        an_sft("sft, every weight", None, strategy="fsdp2", **TWO),
    ],
}
"""What is run, in one launch for each strategy."""
LAUNCHERS = {"one": [], "ddp": launcher("ddp", 2), "three": launcher("ddp", 3), "fsdp2": launcher("fsdp2", 2)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    # Solutions of unequal lengths: each rank's share of a step's tokens is another.
    rows = [{"problem": f"{a} + 1?", "answer": a + 1, "solution": f"{a} + 1 = {a + 1}. " * (a + 1)} for a in range(4)]
    (root / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.fixture(scope="module")
def launched(tiny, data_root, tmp_path_factory):
    """The folder in which the cases of a strategy have left what they found."""
    done = {}

    def of(strategy: str) -> Path:
        if strategy not in done:
            done[strategy] = tmp_path_factory.mktemp(strategy)
            more = {"sft": {"data_root": str(data_root)}}
            cases = [case | more.get(case["kind"], {}) for case in CASES[strategy]]
            launch = LAUNCHERS[strategy]
            command = [sys.executable, *launch, str(SCRIPT), str(tiny), str(done[strategy]), json.dumps(cases)]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)
            assert run.returncode == 0, run.stderr[-3000:]
        return done[strategy]

    return of


def result(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict], bool]:
    found = torch.load(folder / "weights.pt", weights_only=True)
    return found["weights"], json.loads((folder / "logs.json").read_text()), found["sharded"]


@pytest.mark.parametrize(
    ("whole", "strategy", "split"),
    [
        ("adapter", "ddp", "whole groups"),
        ("adapter, ema", "ddp", "micro-batches, ema"),
        ("adapter", "ddp", "groups over micro-batches"),
        ("adapter", "one", "micro-batches"),
        ("adapter", "fsdp2", "whole groups"),
        ("adapter", "fsdp2", "groups over micro-batches"),
        ("every weight", "fsdp2", "every weight"),
        ("trained adapter", "fsdp2", "trained adapter"),
        ("unjudged", "fsdp2", "unjudged"),
        ("dead groups, no KL term", "fsdp2", "dead groups, no KL term"),
    ],
)
def test_one_update_whatever_the_ranks_and_the_shards(launched, tiny, whole, strategy, split):
    weights, logs, _ = result(launched("one") / whole)
    found, again, sharded = result(launched(strategy) / split)
    assert sharded == (strategy == "fsdp2")
    same_weights(weights, found)
    for one, two in zip(logs, again, strict=True):
        for name in METRICS:
            values = [math.nan if value is None else value for value in (one[name], two[name])]
            assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-5, nan_ok=True), name
    untrained = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    moved = [n for n, weight in weights.items() if n not in untrained or not torch.equal(weight, untrained[n])]
    assert moved


def same_weights(weights: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == found.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, found[name], atol=1e-5, rtol=1e-5)


def test_a_group_that_spans_the_ranks_has_the_advantages_of_the_whole_group(launched):
    weights, logs, _ = result(launched("one") / "one group")
    found, again, _ = result(launched("ddp") / "a group over the ranks")
    same_weights(weights, found)
    assert [entry["reward"] for entry in logs] == [entry["reward"] for entry in again]
    assert logs[2]["erpo/progress_std"] == pytest.approx(again[2]["erpo/progress_std"], rel=1e-4)


@pytest.mark.parametrize(
    ("strategy", "case"),
    [
        pytest.param("ddp", "dead groups", id="one group, which spans the ranks"),
        pytest.param("three", "dead groups of twelve", id="ranks that share the new answers unevenly"),
    ],
)
def test_dead_groups_give_way_to_the_same_prompts_on_every_rank(launched, strategy, case):
    weights, logs, _ = result(launched("one") / case)
    found, again, _ = result(launched(strategy) / case)
    same_weights(weights, found)
    assert max(entry["sampling/resample_rounds"] for entry in logs) > 0
    for one, two in zip(logs, again, strict=True):
        for name in ("reward", "sampling/resample_rounds", "sampling/skipped_prompts", "sampling/resampled_tokens"):
            assert one[name] == pytest.approx(two[name]), name
        assert one["completions/max_length"] == two["completions/max_length"]


@pytest.mark.parametrize("case", ["resume", "resume, every weight"])
def test_a_sharded_run_resumes_to_the_last_bit_from_files_that_are_whole(launched, tiny, case):
    weights, logs, sharded = result(launched("fsdp2") / case / "whole")
    again, repeated, _ = result(launched("fsdp2") / case / "again")
    assert sharded
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
    unequal = ("time/", "memory/", "step_time", "epoch")
    for one, two in zip(logs, repeated, strict=True):
        assert {n: v for n, v in one.items() if not n.startswith(unequal)} == {
            n: v for n, v in two.items() if not n.startswith(unequal)
        }
    assert len(logs) == 6
    assert all(entry["erpo/progress_noise"] >= 0 and entry["completions/mean_length"] > 0 for entry in logs)
    checkpoint = launched("fsdp2") / case / "whole" / "checkpoint-6"
    assert is_whole(checkpoint)
    loaded = AutoModelForCausalLM.from_pretrained(tiny if case == "resume" else checkpoint)
    if case == "resume":
        loaded = PeftModel.from_pretrained(loaded, checkpoint)
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.named_parameters())


@pytest.mark.parametrize(("case", "strategy"), [("sft", "ddp"), ("sft, every weight", "fsdp2")])
def test_solutions_give_one_update_whatever_the_ranks(launched, case, strategy):
    one, two = (launched(where) / case for where in ("one", strategy))
    logs, again = (json.loads((folder / "logs.json").read_text()) for folder in (one, two))
    for step, repeated in zip(logs, again, strict=True):
        for name in ("loss", "grad_norm", "num_tokens", "mean_token_accuracy"):
            assert step[name] == pytest.approx(repeated[name], rel=1e-4, abs=1e-5), name
    name = "adapter_model.safetensors" if case == "sft" else "model.safetensors"
    files = [folder / "checkpoints" / "checkpoint-3" / name for folder in (one, two)]
    same_weights(*map(load_file, files))
