"""Dynamic sampling: prompts that nothing can be learnt from give way to others, within a bound, also at a resume."""

import numpy as np
import pytest
from test_trainer import Records, train
from test_trainer_runs import make_trainer, metrics_of

from erpo_core.trainer.config import ERPOConfig
from tiny_model import make_tiny_model

COUNTS = ("sampling/resample_rounds", "sampling/skipped_prompts", "sampling/resampled_tokens")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


class Judge:
    """Answers to ``live`` prompts have unequal rewards, all others 0; keeps what it was asked."""

    __name__ = "judge"

    def __init__(self, live) -> None:
        self.live = live
        self.calls: list[tuple[list[str], int]] = []

    def __call__(self, prompts, completion_ids, **_):
        self.calls.append((prompts[::4], sum(map(len, completion_ids))))
        return [float(row % 2) if prompt in self.live else 0.0 for row, prompt in enumerate(prompts)]


def one_step(tiny, folder, judge, **changes):
    trainer = make_trainer(tiny, folder, reward=judge, max_steps=1, dynamic_sampling=True, **changes)
    trainer.train()
    (batch,) = trainer.rollout_log
    logged = next(entry for entry in trainer.state.log_history if "reward" in entry)
    return [example["prompt"] for example in batch.examples[::4]], logged


def test_every_dead_group_is_replaced_and_what_it_cost_is_counted(tiny, tmp_path):
    judge = Judge({"1+1=", "9+9=", "12+12="})
    trained, logged = one_step(tiny, tmp_path, judge, max_resample_rounds=20)
    assert set(trained) < judge.live
    assert len(set(trained)) == 2
    assert (logged["erpo/frac_dead_groups"], logged["reward"]) == (0, 0.5)
    first, *rounds = judge.calls
    asked = [prompt for prompts, _ in judge.calls for prompt in prompts]
    assert len(asked) == len(set(asked)), "no prompt is asked twice"
    assert rounds
    tokens = sum(count for _, count in rounds)
    assert [logged[name] for name in COUNTS] == [len(rounds), len(asked) - 2, tokens]
    assert logged["completions/sampled_tokens"] == first[1] + tokens


@pytest.mark.parametrize(
    ("bound", "rounds"), [pytest.param(3, 3, id="the bound"), pytest.param(20, 7, id="no prompt is left")]
)
def test_where_nothing_is_alive_it_ends_and_trains_on_what_there_was(tiny, tmp_path, bound, rounds):
    judge = Judge(())
    trained, logged = one_step(tiny, tmp_path, judge, max_resample_rounds=bound)
    assert trained == judge.calls[0][0]
    assert (logged["erpo/frac_dead_groups"], logged["grad_norm"]) == (1, pytest.approx(0, abs=1e-6))
    assert (logged[COUNTS[0]], logged[COUNTS[1]]) == (rounds, 2 * rounds)


def test_it_is_off_by_default(tiny, tmp_path):
    judge = Judge(())
    trainer = make_trainer(tiny, tmp_path, reward=judge, max_steps=1)
    trainer.train()
    assert len(judge.calls) == 1
    assert not any(name in entry for entry in trainer.state.log_history for name in COUNTS)


def test_lengths_are_those_of_the_answers_that_are_trained_on(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, reward=Judge({"3+3=", "4+4="}), max_steps=1, dynamic_sampling=True)
    trainer.train()
    (batch,) = trainer.rollout_log
    logged = next(entry for entry in trainer.state.log_history if "reward" in entry)
    ended = [length for length, done in zip(batch.lengths, batch.finished.tolist(), strict=True) if done]
    for name, lengths in (("", batch.lengths), ("terminated_", ended)):
        found = [logged[f"completions/{kind}_{name}length"] for kind in ("min", "mean", "max")]
        assert not lengths or found == [min(lengths), pytest.approx(sum(lengths) / len(lengths)), max(lengths)]
    assert logged["completions/clipped_ratio"] == 1 - len(ended) / len(batch.lengths)


def test_a_resumed_run_draws_the_same_prompts(tiny, tmp_path):
    settings = {"dynamic_sampling": True, "num_generations": 2, "max_resample_rounds": 2}
    whole = train(tiny, tmp_path / "whole", **settings)
    part = train(tiny, tmp_path / "part", stop_after=2, **settings)
    rest = train(tiny, tmp_path / "rest", resume_from=tmp_path / "part" / "checkpoints" / "checkpoint-2", **settings)
    again = [*part.by_kind["completions"], *rest.by_kind["completions"]]
    assert [c.rows for c in whole.by_kind["completions"]] == [c.rows for c in again]
    kept, found = metrics_of(whole), metrics_of(part) + metrics_of(rest)
    assert sum(metrics[COUNTS[0]] for metrics in kept[2:]) > 0
    for one, two in zip(kept, found, strict=True):
        same = [name for name in one if not name.startswith(("time/", "memory/")) and name != "tokens_per_second"]
        np.testing.assert_array_equal([one[name] for name in same], [two[name] for name in same])


def test_verdicts_are_those_of_the_answers_that_are_trained_on(tiny, tmp_path):
    records: Records = train(tiny, tmp_path, dynamic_sampling=True, num_generations=2, max_steps=2)
    for metrics, completions in zip(metrics_of(records), records.by_kind["completions"], strict=True):
        found = [row["verdict"] for row in completions.rows]
        for name in ("right", "wrong", "unparsable"):
            assert metrics[f"verdict/{name}"] == found.count(name) / len(found)


class Shaping(Judge):
    """Differs in every group."""

    __name__ = "shaping"

    def __call__(self, prompts, completion_ids, **_):
        return [float(row % 4) for row in range(len(prompts))]


@pytest.mark.parametrize("layout", [{}, {"algorithm": "grpo", "beta": 0.0}, {"num_iterations": 2}])
def test_a_group_of_one_outcome_is_dead_where_the_outcome_decides(tiny, tmp_path, layout):
    told = {}
    for on in ("total", "outcome"):
        judges = [Judge(()), Shaping(())]
        settings = layout | {"outcome_reward": "judge", "dead_group_on": on}
        trainer = make_trainer(tiny, tmp_path / on, reward=judges, max_steps=1, **settings)
        trainer.train()
        told[on] = next(entry for entry in trainer.state.log_history if "reward" in entry)
    names = ("erpo/frac_dead_groups", "erpo/frac_live_by_shaping", "erpo/frac_all_wrong", "erpo/max_abs_advantage")
    assert [told["outcome"][name] for name in names] == [1, 0, 1, 0]
    assert [told["total"][name] for name in names[:3]] == [0, 1, 1]
    assert told["total"]["erpo/max_abs_advantage"] > 0
    assert told["total"]["reward"] == told["outcome"]["reward"] == 1.5


def test_groups_of_one_outcome_give_way_where_the_outcome_decides(tiny, tmp_path):
    judge = Judge({"1+1=", "9+9=", "12+12="})
    settings = {"max_resample_rounds": 20, "outcome_reward": "judge", "dead_group_on": "outcome"}
    trained, logged = one_step(tiny, tmp_path, [judge, Shaping(())], **settings)
    assert set(trained) < judge.live
    assert logged["erpo/frac_dead_groups"] == 0


def test_a_bound_below_one_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="max_resample_rounds"):
        ERPOConfig(str(tmp_path), use_cpu=True, dynamic_sampling=True, max_resample_rounds=0)
