"""What is told of a step: metrics of the answers that it is trained on, of its update, and traces of whole groups."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_trainer import Records, train
from test_trainer_runs import even_ids, make_trainer, metrics_of

from erpo_core.codec import decode_trace
from erpo_core.metric_names import describe
from erpo_core.trainer.callbacks import RecordCallback
from erpo_core.trainer.credit import TokenCredit
from erpo_core.trainer.scoring import score_rollouts
from tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def test_every_metric_of_a_run_is_in_the_registry(tiny, tmp_path):
    for metrics in metrics_of(train(tiny, tmp_path, max_steps=1)):
        assert [name for name in metrics if describe(name) is None] == []


def test_each_step_tells_of_the_answers_it_is_trained_on(tiny, tmp_path):
    records = train(tiny, tmp_path, num_iterations=2, max_steps=4, trace_every=0)
    names = ("reward", "reward_std", "rewards/accuracy", "verdict/wrong", "completions/mean_length")
    names += ("erpo/frac_dead_groups", "erpo/frac_silent_buckets", "erpo/advantage_sum_residual")
    told = [[metrics[name] for name in names] for metrics in metrics_of(records)]
    assert None not in told[0]
    assert told[0] == told[1] != told[2] == told[3]
    assert [bool(metrics.get("completions/sampled_tokens")) for metrics in metrics_of(records)] == [True, False] * 2
    for checkpoint in records.by_kind["checkpoint"]:
        assert checkpoint.data["reward"] == told[checkpoint.step - 1][0]


def test_where_no_answer_ends_by_itself_nothing_is_told_of_such_answers(tiny, tmp_path):
    def reward(completion_ids, **_):
        return [float(row % 2) for row in range(len(completion_ids))]

    trainer = make_trainer(tiny, tmp_path, reward=reward, max_completion_length=1, max_steps=1)
    trainer.train()
    (batch,) = trainer.rollout_log
    assert not batch.finished.any()
    (logs,) = (entry for entry in trainer.state.log_history if "reward" in entry)
    assert [logs.get(f"completions/{kind}_terminated_length") for kind in ("mean", "min", "max")] == [None] * 3
    assert logs["completions/min_length"] == 1


def recorded(tiny, folder, **changes) -> Records:
    """The records of a trainer whose micro-batches are chosen here; a job's are derived."""
    records = Records()
    trainer = make_trainer(tiny, folder, **(changes | {"trace_every": 1}))
    callback = RecordCallback(records, records, {})
    trainer.add_callback(callback)
    callback.attach(trainer)
    trainer.train()
    return records


@pytest.mark.parametrize(
    ("size", "accumulation", "steps_per_generation"),
    [pytest.param(2, 4, 4, id="of one update"), pytest.param(2, 1, 4, id="of several updates")],
)
def test_groups_in_parts_are_traced_and_checked_as_whole_ones(tiny, tmp_path, size, accumulation, steps_per_generation):
    whole = recorded(tiny, tmp_path, trace_groups=2)
    parts = recorded(
        tiny,
        tmp_path,
        trace_groups=2,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=steps_per_generation,
    )
    names = ("prompt_id", "group", "sample", "completion", "reward", "advantage", "verdict")
    found = [[trace for trace in records.by_kind["trace"] if trace.step == 1] for records in (whole, parts)]
    assert [trace.meta["group"] for trace in found[0]] == [0, 0, 0, 0, 1, 1, 1, 1]
    for one, two in zip(*found, strict=True):
        assert [one.meta[name] for name in names] == pytest.approx([two.meta[name] for name in names])
        assert one.meta["group_stats"] == pytest.approx(two.meta["group_stats"], rel=1e-5)
        channels = [decode_trace(trace.payload) for trace in (one, two)]
        if accumulation == 1 and "leverage" not in channels[1]:
            del channels[0]["leverage"]  # another update differentiates this answer
        for name, values in channels[0].items():
            np.testing.assert_allclose(values, channels[1][name], atol=2e-3, err_msg=name)
    assert np.abs(channels[0]["advantage"]).max() > 0
    if accumulation > 1:
        for name in ("sum", "var"):
            values = [records.by_kind["metrics"][0].values for records in (whole, parts)]
            name = f"erpo/advantage_{name}_residual_applied"
            assert values[1][name] == pytest.approx(values[0][name], abs=1e-5)
            assert values[1][name] < 1e-3


def test_an_update_on_the_same_answers_is_measured_on_the_policy_as_it_is_by_then(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, num_iterations=2, max_steps=2, beta=0.1, learning_rate=0.05)
    seen, compute = [], trainer._compute_loss

    def scored_by_hand(model, batch):
        with torch.no_grad():
            seen.append(score_rollouts(trainer._policy, batch.rollouts, temperature=1.0).entropies)
        return compute(model, batch)

    trainer._compute_loss = scored_by_hand
    trainer.train()
    first, second = (logs for logs in trainer.state.log_history if "entropy" in logs)
    for logs, entropies in zip((first, second), seen, strict=True):
        assert logs["entropy"] == pytest.approx(entropies.mean().item(), rel=1e-5)
        highest = entropies.sort().values[int(0.95 * len(entropies))].item()
        assert logs["entropy/p95"] == pytest.approx(highest, rel=1e-5)
    assert abs(first["entropy"] - second["entropy"]) > 1e-3
    assert second["kl"] > 1e-3
    assert first["kl/exact"] == pytest.approx(0, abs=1e-6)
    assert second.get("kl/exact") is None


def test_where_a_group_lies_in_several_micro_batches_the_exact_kl_of_the_step_is_told(tiny, tmp_path):
    layout = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2}
    trainer = make_trainer(tiny, tmp_path, learning_rate=0.05, **layout)
    trainer.train()
    found = [logs["kl/exact"] for logs in trainer.state.log_history if "entropy" in logs]
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found[1] > 1e-3


def test_what_a_reward_function_logs_is_logged_and_does_not_pile_up(tiny, tmp_path):
    def reward(completion_ids, log_metric, log_extra, trainer_state, **_):
        log_metric("mine", trainer_state.global_step)
        log_metric("mine", trainer_state.global_step + 1)
        log_metric("reward", 1e6)
        log_extra("length", [len(ids) for ids in completion_ids])
        return even_ids(completion_ids)

    trainer = make_trainer(tiny, tmp_path, reward=reward, max_steps=3)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["mine"] for entry in logs] == [0.5, 1.5, 2.5]
    assert max(entry["reward"] for entry in logs) <= 1, "what the trainer itself tells stays"
    assert list(trainer._logs["extra"]["length"]) == trainer.rollout_log[0].lengths
    assert [extra["length"] for extra in trainer.rollout_log[0].extras] == trainer.rollout_log[0].lengths
    assert not trainer._pending_metrics
    assert not trainer._pending_extra_logs


def test_reward_functions_of_one_name_are_told_apart(tiny, tmp_path):
    rewards = [lambda completion_ids, **_: even_ids(completion_ids), lambda completion_ids, **_: [7.0] * 8]
    trainer = make_trainer(tiny, tmp_path, reward=rewards, max_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rewards/<lambda>"] + logged["rewards/<lambda>_2"] == logged["reward"]
    assert logged["rewards/<lambda>_2"] == 7


@pytest.mark.parametrize(
    ("size", "accumulation", "steps_per_generation"),
    [
        pytest.param(8, 1, 2, id="whole groups"),
        pytest.param(2, 2, 8, id="groups in parts, whole in a step"),
        pytest.param(2, 1, 4, id="parts of groups"),
    ],
)
def test_each_step_of_a_generation_tells_of_its_own_answers(tiny, tmp_path, size, accumulation, steps_per_generation):
    layout = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    layout |= {"steps_per_generation": steps_per_generation, "max_steps": steps_per_generation // accumulation}
    trainer = make_trainer(tiny, tmp_path, **layout)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    rewards = torch.cat([batch.rewards for batch in trainer.rollout_log])
    lengths = [length for batch in trainer.rollout_log for length in batch.lengths]
    share = size * accumulation
    dead = rewards.view(-1, 4).std(1) == 0
    for step, told in enumerate(logs):
        own = slice(step * share, (step + 1) * share)
        assert told["reward"] == pytest.approx(rewards[own].mean().item())
        assert told["reward_std"] == pytest.approx(rewards[own].std().item(), nan_ok=True)
        assert told["rewards/even_ids"] == told["reward"]
        assert told["completions/mean_length"] == pytest.approx(np.mean(lengths[own]))
        groups = {row // 4 for row in range(own.start, own.stop)}
        assert told["erpo/frac_dead_groups"] == np.mean([dead[group].item() for group in groups])
    assert len(logs) == layout["max_steps"]
    assert len({told["reward"] for told in logs}) > 1


def test_the_groups_of_a_step_are_those_of_its_answers_on_all_ranks():
    """Two ranks with three steps of two answers each, in groups of four: no rank has whole groups."""
    credit = SimpleNamespace(
        args=SimpleNamespace(gradient_accumulation_steps=1, per_device_train_batch_size=2),
        num_generations=4,
        accelerator=SimpleNamespace(device="cpu"),
    )
    found = [TokenCredit._rows_of_groups(credit, 12, step, 3).view(3, 4).all(1).tolist() for step in range(3)]
    assert found == [[True, True, False], [True, False, True], [False, True, True]]
