"""What a later attempt goes on from: all of it, and not a step more."""

import json
import random
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_evaluating import EVALUATED, StopAt, evaluations, plain
from test_plugins import register
from test_preflight import DRAWS
from test_trainer import Records, train
from test_trainer_runs import SMALL_DATASET, make_trainer
from transformers import AutoModelForCausalLM

from erpo_core.checkpoints import checkpoint_folder, list_steps
from erpo_core.job import ModelInput
from erpo_core.trainer.callbacks import RecordCallback
from erpo_core.trainer.randomness import RandomState
from erpo_core.trainer.rollouts import SampledAnswers
from erpo_core.trainer.state import FILE_NAME, RunState
from erpo_core.trainer.zero import ZeroOptimizer
from tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def checkpoint(work_dir: Path, step: int) -> Path:
    return checkpoint_folder(work_dir / "checkpoints", step)


def result(records) -> dict:
    """Without what takes another time each time."""
    (record,) = records.by_kind["result"]
    final = {n: v for n, v in record.data["final"].items() if not n.startswith(("time/", "memory/", "tokens_per"))}
    return record.data | {"final": final, "seconds": None}


@pytest.mark.bitwise
def test_a_run_that_started_from_an_adapter_goes_on_with_what_it_has_learnt(tiny, tmp_path, monkeypatch):
    torch.manual_seed(5)
    start = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    start.save_pretrained(tmp_path / "start")
    monkeypatch.setattr("test_trainer.ModelInput", lambda base: ModelInput(base, tmp_path / "start"))
    whole = train(tiny, tmp_path / "whole")
    rest = train(tiny, tmp_path / "rest", resume_from=checkpoint(tmp_path / "whole", 2))
    assert plain(whole)[2:] == plain(rest)
    assert plain(rest)[0]["erpo/progress_std"] > 0
    one, two = (load_file(checkpoint(tmp_path / name, 4) / "adapter_model.safetensors") for name in ("whole", "rest"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), checkpoint(tmp_path / "rest", 4))
    assert list(loaded.peft_config) == ["default"]


@pytest.mark.bitwise
def test_a_run_that_was_killed_after_its_last_save_makes_no_step_more(tiny, tmp_path):
    whole = train(tiny, tmp_path / "whole", **EVALUATED)
    again = train(tiny, tmp_path / "again", resume_from=checkpoint(tmp_path / "whole", 4), **EVALUATED)
    assert plain(again) == []
    assert list_steps(tmp_path / "again" / "checkpoints") == []
    assert evaluations(again) == {4: evaluations(whole)[4]}, "nobody knows that it had been reported"
    assert result(again) == result(whole)


def test_a_run_goes_on_in_another_dtype_and_says_so(tiny, tmp_path, monkeypatch):
    """A base above 0.5B is bfloat16 on CUDA and float32 on a CPU."""
    monkeypatch.setattr("erpo_core.trainer.run._load_dtype", lambda *_: torch.bfloat16)
    train(tiny, tmp_path / "first", bf16=True, max_steps=2)
    monkeypatch.undo()
    rest = train(tiny, tmp_path / "rest", resume_from=checkpoint(tmp_path / "first", 2))
    (event,) = (one for one in rest.by_kind["event"] if one.type == "resume.environment_changed")
    assert event.data["dtype"] == {"before": "torch.bfloat16", "now": "torch.float32"}
    assert [record.step for record in rest.by_kind["metrics"]] == [3, 4]


@pytest.mark.bitwise
def test_the_result_is_that_of_all_attempts(tiny, tmp_path):
    whole = train(tiny, tmp_path / "whole")
    rest = train(tiny, tmp_path / "rest", resume_from=checkpoint(tmp_path / "whole", 2))
    assert {name: result(rest)[name] for name in ("steps", "tokens", "train_loss")} == {
        name: result(whole)[name] for name in ("steps", "tokens", "train_loss")
    }
    assert result(whole)["tokens"] == sum(
        row["num_tokens"] for record in whole.by_kind["completions"] for row in record.rows
    )
    assert rest.by_kind["result"][0].data["seconds"] > 0


def test_a_run_that_leaves_in_its_last_evaluation_has_saved_its_last_step(tiny, tmp_path):
    """And makes that evaluation when it goes on."""
    whole = train(tiny, tmp_path / "whole", **EVALUATED)
    of_last = sum(record.phase == "evaluate" for record in whole.by_kind["progress"])
    part = train(tiny, tmp_path / "part", records=StopAt(evaluated=of_last), **EVALUATED)
    assert part.by_kind["result"] == []
    assert part.by_kind["checkpoint"][-1].step == 4
    assert sorted(evaluations(part)) == [0, 3]
    rest = train(tiny, tmp_path / "rest", resume_from=checkpoint(tmp_path / "part", 4), **EVALUATED)
    assert evaluations(rest) == {4: evaluations(whole)[4]}
    assert rest.by_kind["result"]


def test_an_evaluation_inside_a_cycle_is_made_although_the_run_is_to_leave(tiny, tmp_path, monkeypatch):
    stop, ended = StopAt(), RecordCallback.on_step_end

    def ask_then_end(callback, args, state, control, **more):
        stop.asked |= state.global_step == 3  # the first of two updates from the same answers
        return ended(callback, args, state, control, **more)

    monkeypatch.setattr(RecordCallback, "on_step_end", ask_then_end)
    twice = EVALUATED | {"num_iterations": 2, "max_steps": 6, "save_steps": 100}
    # Leaving inside an evaluation is another matter.
    monkeypatch.setattr("erpo_core.trainer.evaluating.watch_and_leave", lambda stop: None)
    part = train(tiny, tmp_path / "part", records=stop, **twice)
    assert part.by_kind["checkpoint"][-1].step == 4
    assert sorted(evaluations(part)) == [0, 3]


def test_a_checkpoint_is_announced_before_an_older_one_makes_room(tiny, tmp_path):
    parent, seen = tmp_path / "checkpoints", []

    class Watching(Records):
        def emit(self, record):
            super().emit(record)
            if record.kind == "checkpoint":
                seen.append(list_steps(parent))

    records = train(tiny, tmp_path, records=Watching(), save_steps=1, save_total_limit=1, max_steps=3)
    best = max(range(1, 4), key=lambda step: (records.by_kind["metrics"][step - 1].values["reward"], -step))
    assert all(set(on_disk) >= {step - 1, step} - {0} for step, on_disk in enumerate(seen, 1))
    removed = [event.data for event in records.by_kind["event"] if event.type == "checkpoint.removed"]
    kept = sorted({best, 3})
    assert list_steps(parent) == kept
    assert sorted(data["step"] for data in removed) == [step for step in (1, 2) if step not in kept]
    assert [data["path"] for data in removed] == [str(checkpoint_folder(parent, data["step"])) for data in removed]


@pytest.mark.bitwise
def test_a_run_that_leaves_while_dead_groups_are_replaced_counts_nothing_twice(tiny, tmp_path, monkeypatch):
    stop, answer = StopAt(), SampledAnswers._answer_together

    def ask_then_answer(trainer, examples, number):
        stop.asked |= trainer.state.global_step == 2
        return answer(trainer, examples, number)

    replaced = {"dynamic_sampling": True, "save_steps": 10}
    replaced["rewards"] = [{"name": "accuracy"}, {"name": "regex", "args": {"pattern": "^[a-f]"}}]
    whole = train(tiny, tmp_path / "whole", **replaced)
    monkeypatch.setattr(SampledAnswers, "_answer_together", ask_then_answer)
    part = train(tiny, tmp_path / "part", records=stop, **replaced)
    monkeypatch.undo()
    assert [record.step for record in part.by_kind["checkpoint"]] == [2]
    rest = train(tiny, tmp_path / "rest", resume_from=checkpoint(tmp_path / "part", 2), **replaced)
    assert plain(part) + plain(rest) == plain(whole)


@pytest.mark.bitwise
@pytest.mark.parametrize(
    ("left_in", "settings"),
    [
        pytest.param("_answer", {}, id="its first generation"),
        pytest.param("_answer_together", {"dynamic_sampling": True, "dead_group_on": "outcome"}, id="new prompts"),
    ],
)
def test_a_run_that_leaves_as_an_epoch_begins_draws_as_if_it_had_not(tiny, tmp_path, monkeypatch, left_in, settings):
    """The epoch's iterator has drawn from torch's generator by then, rewards of dead groups from all generators."""
    register(tmp_path / "site", monkeypatch, DRAWS, draws="own_rewards:draws")
    settings = settings | {"dataset": SMALL_DATASET, "save_steps": 10, "outcome_reward": "regex"}
    settings["rewards"] = [{"name": "draws"}, {"name": "regex", "args": {"pattern": "^[a-f]"}}]
    stop, answer = StopAt(), getattr(SampledAnswers, left_in)

    def ask_then_answer(trainer, *given):
        stop.asked |= trainer.state.global_step == 2  # an epoch has two steps
        return answer(trainer, *given)

    whole = train(tiny, tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(SampledAnswers, left_in, ask_then_answer)
        part = train(tiny, tmp_path / "part", records=stop, **settings)
    assert [record.step for record in part.by_kind["checkpoint"]] == [2]
    rest = train(tiny, tmp_path / "rest", resume_from=checkpoint(tmp_path / "part", 2), **settings)
    assert plain(part) + plain(rest) == plain(whole)


def test_random_states_are_gone_back_to_for_a_while():
    def draw() -> list[float]:
        return [random.random(), np.random.rand(), torch.rand(()).item()]

    before = RandomState.current()
    first, second = draw(), draw()
    before.restore()
    assert draw() == first
    with before.restored():
        assert draw() == first
    assert draw() == second


def test_a_checkpoint_of_another_version_is_read_as_far_as_it_is_known(tmp_path):
    (tmp_path / FILE_NAME).write_text(json.dumps({"skipped_steps": 3, "a_name_of_old": 1}))
    assert RunState.load(tmp_path) == RunState(skipped_steps=3)


@pytest.mark.parametrize(("fused", "place"), [(True, "meta"), (False, "cpu")])
def test_a_fused_optimizer_under_zero_counts_its_steps_on_the_device(fused, place):
    """As torch's own does when it is loaded: a kernel on a GPU cannot read a count in the CPU's memory."""
    flat = torch.empty(4, device="meta")
    deepspeeds = SimpleNamespace(
        optimizer=SimpleNamespace(param_groups=[], state={}), fp32_partitioned_groups_flat=[flat]
    )
    optimizer = ZeroOptimizer(deepspeeds, [{"params": [], "fused": fused}])
    state = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}
    optimizer.load_state_dict({"state": {0: state}, "param_groups": [{}]})
    assert optimizer.state[flat]["step"].device.type == place
    assert optimizer.state[flat]["exp_avg"].device.type == "meta"


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2, "save_steps": 2}, {"entropy_stats": "ema"}])
def test_a_trainer_that_was_interrupted_inside_a_step_goes_on_as_if_it_had_not_been(tiny, tmp_path, settings):
    """As in a notebook: the same trainer, which has answers left and half of a step counted."""
    steps = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1, "max_steps": 4} | settings
    whole, interrupted = (make_trainer(tiny, tmp_path / name, **steps) for name in ("whole", "interrupted"))
    whole.train()
    training_step, calls = interrupted.training_step, count(1)

    def interrupt(*args, **kwargs):
        if next(calls) == 6:
            raise KeyboardInterrupt
        return training_step(*args, **kwargs)

    interrupted.training_step = interrupt
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    interrupted.train(resume_from_checkpoint=True)
    logs = [[logs for logs in trainer.state.log_history if "loss" in logs] for trainer in (whole, interrupted)]
    for one, other in zip(*logs, strict=True):
        timeless = [name for name in one if not name.startswith(("time/", "step_time"))]
        assert [one[name] for name in timeless] == [other[name] for name in timeless], one["step"]
    for one, other in zip(whole.model.parameters(), interrupted.model.parameters(), strict=True):
        assert torch.equal(one, other)
