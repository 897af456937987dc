"""One update from one batch, however it lies over ranks, micro-batches and generations (gloo on the CPU)."""

import json
import math
from pathlib import Path

import pytest
import torch
from forked import Forked

from tiny_model import make_tiny_model

SCRIPT = Path(__file__).with_name("ranks_script.py")
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


@pytest.fixture(scope="module")
def train(tiny, tmp_path_factory):
    """Train on some ranks; the weights and the logs."""
    with Forked(SCRIPT, tmp_path_factory.mktemp("log")) as script:

        def train(out: Path, num_ranks: int, layout: str) -> tuple[dict, list[dict]]:
            assert script.run(str(tiny), str(out), layout, num_ranks=num_ranks) == [0] * num_ranks, script.log
            return torch.load(out / "weights.pt", weights_only=True), json.loads((out / "logs.json").read_text())

        yield train


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """One process, one micro-batch a step."""
    found = {}

    def of(loss_type: str, entropy_stats: str):
        key = (loss_type, entropy_stats)
        if key not in found:
            found[key] = train(tmp_path_factory.mktemp("whole"), 1, f"16,1,1,{loss_type},{entropy_stats}")
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
def test_one_update_whatever_the_ranks(train, tmp_path, whole, num_ranks, layout):
    per_device, accumulation, _, loss_type, entropy_stats = layout.split(",")
    assert int(per_device) * int(accumulation) * num_ranks == 16
    weights, logs = whole(loss_type, entropy_stats)
    found, again = train(tmp_path, num_ranks, layout)
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, found[name], atol=1e-5, rtol=1e-5)
    for one, two in zip(logs, again, strict=True):
        for name in METRICS:
            assert math.isclose(one[name], two[name], rel_tol=1e-4, abs_tol=1e-5), (name, one[name], two[name])


def test_a_group_that_spans_the_ranks_has_the_advantages_of_the_whole_group(train, tmp_path):
    weights, logs = train(tmp_path / "one", 1, "4,1,1,erpo,group")
    found, again = train(tmp_path / "two", 2, "2,1,1,erpo,group")
    for name, weight in weights.items():
        torch.testing.assert_close(weight, found[name], atol=1e-5, rtol=1e-5)
    assert [entry["reward"] for entry in logs] == [entry["reward"] for entry in again]
    assert logs[2]["erpo/progress_std"] == pytest.approx(again[2]["erpo/progress_std"], rel=1e-4)
