"""A training that is killed with SIGKILL and resumed ends as the one that never was, to the last bit."""

import json
import signal
from pathlib import Path

import pytest
import torch
from forked import Forked

from erpo_core import checkpoints
from tiny_model import make_tiny_model

SCRIPT = Path(__file__).with_name("killed_script.py")
UNEQUAL = ("time/", "memory/", "step_time", "epoch")
"""What the clock or the address space decides."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The training that nobody kills, by another interpreter."""
    out = tmp_path_factory.mktemp("whole")
    with Forked(SCRIPT, tmp_path_factory.mktemp("log"), num_threads=2) as script:
        assert script.run(str(tiny), str(out)) == 0, script.log
    return out


@pytest.fixture(scope="module")
def mortal(tmp_path_factory):
    with Forked(SCRIPT, tmp_path_factory.mktemp("log"), num_threads=2) as script:
        yield script


def metrics(out: Path) -> dict[int, dict]:
    """By step; what a resumed run reports again takes the place of what it had reported before."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {e["step"]: {n: v for n, v in e.items() if not n.startswith(UNEQUAL)} for e in entries}


@pytest.mark.parametrize(
    "deaths",
    [
        pytest.param(["generate:1", "save:3", "backward:5"], id="sampling, saving, second epoch"),
        pytest.param(
            ["publish:2", "saved:3", "save:6", "publish:7", "saved:8"], id="around the naming, after the last save"
        ),
    ],
)
def test_a_killed_training_ends_as_if_it_had_never_been(tiny, tmp_path, whole, mortal, deaths):
    for death in deaths:
        assert mortal.run(str(tiny), str(tmp_path), death) == -signal.SIGKILL, (death, mortal.log)
        left = checkpoints.list_steps(tmp_path)
        assert all(checkpoints.is_whole(checkpoints.checkpoint_folder(tmp_path, step)) for step in left)
    assert mortal.run(str(tiny), str(tmp_path)) == 0, mortal.log
    one, two = (torch.load(out / "end.pt", weights_only=True) for out in (whole, tmp_path))
    assert all(torch.equal(weight, two["weights"][name]) for name, weight in one["weights"].items())
    for index, state in one["optimizer"].items():
        assert all(torch.equal(value, two["optimizer"][index][name]) for name, value in state.items())
    assert metrics(whole) == metrics(tmp_path)
    assert len(metrics(whole)) == 8


def test_a_damaged_checkpoint_is_passed_over(tiny, tmp_path, whole):
    for step in checkpoints.list_steps(whole):
        folder = checkpoints.checkpoint_folder(tmp_path, step)
        folder.mkdir()
        for path in checkpoints.checkpoint_folder(whole, step).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    last = checkpoints.checkpoint_folder(tmp_path, 8)
    weights = last / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert checkpoints.newest_whole(tmp_path).name == "checkpoint-7"
    (last / checkpoints.MANIFEST).unlink()
    assert checkpoints.newest_whole(tmp_path).name == "checkpoint-7"
