"""One update from one batch, however it lies over ranks, micro-batches and generations (gloo on the CPU)."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tiny_model import make_tiny_model

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


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def train(tiny, out: Path, num_ranks: int, layout: str) -> tuple[dict, list[dict]]:
    command = [sys.executable, str(SCRIPT), str(tiny), str(out), layout]
    if num_ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        command = [sys.executable, *launcher, *command[1:]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out / "weights.pt", weights_only=True), json.loads((out / "logs.json").read_text())


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """One process, one micro-batch a step."""
    found = {}

    def of(loss_type: str, entropy_stats: str):
        key = (loss_type, entropy_stats)
        if key not in found:
            found[key] = train(tiny, tmp_path_factory.mktemp("whole"), 1, f"16,1,1,{loss_type},{entropy_stats}")
        return found[key]

    return of


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        pytest.param(2, "8,1,1,erpo,group", id="two ranks, whole groups"),
        pytest.param(2, "4,2,2,erpo,ema", id="two ranks, two micro-batches, running statistics"),
        pytest.param(2, "2,4,4,erpo,group", id="two ranks, groups over micro-batches"),
        pytest.param(1, "2,8,8,erpo,group", id="one rank, groups over micro-batches"),
    ],
)
def test_one_update_whatever_the_ranks(tiny, tmp_path, whole, num_ranks, layout):
    per_device, accumulation, _, loss_type, entropy_stats = layout.split(",")
    assert int(per_device) * int(accumulation) * num_ranks == 16
    weights, logs = whole(loss_type, entropy_stats)
    found, again = train(tiny, tmp_path, num_ranks, layout)
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, found[name], atol=1e-5, rtol=1e-5)
    for one, two in zip(logs, again, strict=True):
        for name in METRICS:
            assert math.isclose(one[name], two[name], rel_tol=1e-4, abs_tol=1e-5), (name, one[name], two[name])


def test_a_group_that_spans_the_ranks_has_the_advantages_of_the_whole_group(tiny, tmp_path):
    weights, logs = train(tiny, tmp_path / "one", 1, "4,1,1,erpo,group")
    found, again = train(tiny, tmp_path / "two", 2, "2,1,1,erpo,group")
    for name, weight in weights.items():
        torch.testing.assert_close(weight, found[name], atol=1e-5, rtol=1e-5)
    assert [entry["reward"] for entry in logs] == [entry["reward"] for entry in again]
    assert logs[2]["erpo/progress_std"] == pytest.approx(again[2]["erpo/progress_std"], rel=1e-4)


@pytest.mark.parametrize(
    ("num_ranks", "size"),
    [
        pytest.param(2, 2, id="one group, which spans the ranks"),
        pytest.param(3, 4, id="ranks that share the new answers unevenly"),
    ],
)
def test_dead_groups_give_way_to_the_same_prompts_on_every_rank(tiny, tmp_path, num_ranks, size):
    weights, logs = train(tiny, tmp_path / "one", 1, f"{num_ranks * size},1,1,erpo,group,dynamic")
    found, again = train(tiny, tmp_path / "many", num_ranks, f"{size},1,1,erpo,group,dynamic")
    for name, weight in weights.items():
        torch.testing.assert_close(weight, found[name], atol=1e-5, rtol=1e-5)
    assert max(entry["sampling/resample_rounds"] for entry in logs) > 0
    for one, two in zip(logs, again, strict=True):
        for name in ("reward", "sampling/resample_rounds", "sampling/skipped_prompts", "sampling/resampled_tokens"):
            assert one[name] == pytest.approx(two[name]), name
        assert one["completions/max_length"] == two["completions/max_length"]
