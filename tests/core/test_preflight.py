"""The pre-flight: what it lets pass, what it fails and why, and that training is the same with and without."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
from test_plugins import register
from test_trainer import Records, train

from erpo_core.errors import RunError
from erpo_core.trainer import preflight
from erpo_core.trainer.preflight import Findings, run_preflight, why_nothing_is_learnt
from tiny_model import make_tiny_model

BOXED_ONLY = {"rewards": [{"name": "accuracy"}, {"name": "boxed_format", "weight": 0.2}]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def events(records) -> dict:
    return {event.type: event for event in records.by_kind["event"]}


def test_where_rewards_differ_the_job_goes_on_and_says_what_it_saw(tiny, tmp_path):
    records = train(tiny, tmp_path, max_steps=1, preflight=True)
    found = events(records)["preflight.passed"]
    assert found.data["groups_with_spread"] >= 1
    assert (found.data["prompts"], found.data["answers"]) == (2, 8), "one generation batch was enough"
    assert found.level == "warn", "a random model boxes nothing"
    assert [record.step for record in records.by_kind["metrics"]] == [1]


def test_where_no_reward_can_differ_the_job_fails_before_its_first_step(tiny, tmp_path):
    records = Records()
    with pytest.raises(RunError) as caught:
        train(tiny, tmp_path, records=records, preflight=True, **BOXED_ONLY)
    assert caught.value.code == "preflight_failed"
    assert "no answer is boxed" in caught.value.message
    found = events(records)["preflight.failed"].data
    assert {"no_reward_spread", "nothing_boxed"} <= set(found["reasons"])
    assert (found["prompts"], found["answers"], found["right"]) == (16, 64, 0)
    assert records.by_kind["metrics"] == []


def test_where_the_outcome_decides_other_rewards_are_no_spread(tiny, tmp_path):
    with pytest.raises(RunError, match="nothing can be learnt"):
        train(tiny, tmp_path, preflight=True, dead_group_on="outcome")


def test_it_can_be_left_out(tiny, tmp_path):
    records = train(tiny, tmp_path, max_steps=1, preflight=False, **BOXED_ONLY)
    assert not any(name.startswith("preflight") for name in events(records))


DRAWS = """
import random, numpy, torch

def draws(completions, **_):
    return [random.random() + numpy.random.rand() + torch.rand(()).item() for _ in completions]
"""


@pytest.mark.bitwise
def test_training_is_the_same_to_the_last_bit_with_and_without(tiny, tmp_path, monkeypatch):
    """Also with a reward that draws from the global generators, as a user's may."""
    register(tmp_path / "site", monkeypatch, DRAWS, draws="own_rewards:draws")
    rewards = [{"name": "draws"}, {"name": "regex", "args": {"pattern": "[0-9a-f]"}}]
    runs = {}
    for wanted in (True, False):
        random.seed(5)
        np.random.seed(5)
        runs[wanted] = train(
            tiny, tmp_path / str(wanted), preflight=wanted, rewards=rewards, outcome_reward="regex", lora={"r": 4}
        )
    with_it, without = runs[True], runs[False]
    for one, two in zip(with_it.by_kind["metrics"], without.by_kind["metrics"], strict=True):
        differing = [k for k in one.values if one.values[k] != two.values[k] and one.values[k] == one.values[k]]
        assert [k for k in differing if not k.startswith(("time/", "memory/", "tokens_per"))] == []
    assert [c.rows for c in with_it.by_kind["completions"]] == [c.rows for c in without.by_kind["completions"]]


def test_a_resumed_run_is_not_checked_again(tiny, tmp_path):
    part = train(tiny, tmp_path / "part", stop_after=2, preflight=True)
    assert "preflight.passed" in events(part)
    rest = train(
        tiny, tmp_path / "rest", preflight=True, resume_from=tmp_path / "part" / "checkpoints" / "checkpoint-2"
    )
    assert "preflight.passed" not in events(rest)


@pytest.mark.parametrize(
    ("own", "others", "looks"),
    [
        pytest.param((0, 0, 0, 0), (0, 1, 1, 1), 2, id="the other rank saw a spread"),
        pytest.param((0, 1, 1, 1), (0, 0, 0, 0), 2, id="this rank saw one"),
        pytest.param((0, 0, 0, 0), (0, 0, 0, 0), 4, id="none did"),
    ],
)
def test_ranks_look_and_decide_together(monkeypatch, own, others, looks):
    """Each look samples on all ranks together: one that went on alone would wait for ever."""
    seen = []

    def look(trainer, rows, start, stop):
        seen.append(start)
        return Findings(prompts=4, answers=8, groups_with_spread=own[len(seen) - 1])

    monkeypatch.setattr(preflight, "_look_at", look)
    trainer = SimpleNamespace(
        train_dataset=list(range(16)),
        args=SimpleNamespace(seed=0, generation_batch_size=8),
        num_generations=2,
        reward_func_names=["accuracy"],
        max_completion_length=8,
        accelerator=SimpleNamespace(
            num_processes=2, device="cpu", reduce=lambda values, how: values + others[len(seen) - 1]
        ),
    )
    records = Records()
    if looks == 4:
        with pytest.raises(RunError):
            run_preflight(trainer, records, records)
    else:
        run_preflight(trainer, records, records)
    assert len(seen) == looks
    assert ("preflight.passed" in events(records)) == (looks < 4)


@pytest.mark.parametrize(
    ("found", "wants_box", "reasons"),
    [
        (Findings(16, 64, 64, 0, 0, 0), True, {"all_truncated", "nothing_boxed"}),
        (Findings(16, 64, 3, 64, 0, 0), True, {"all_wrong"}),
        (Findings(16, 64, 3, 64, 64, 0), True, {"all_right"}),
        (Findings(16, 64, 3, 0, 0, 0), False, {"all_wrong"}),
        (Findings(16, 64, 3, 60, 60, 0), True, set()),
    ],
)
def test_reasons_are_named_as_far_as_they_are_seen(found, wants_box, reasons):
    assert set(why_nothing_is_learnt(found, wants_box, 100)) == reasons | {"no_reward_spread"}
