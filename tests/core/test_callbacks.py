"""What the records of a training say beside the metrics."""

from types import SimpleNamespace

import pytest
import torch
from test_trainer import Records
from test_trainer_runs import make_trainer

from erpo_core.generation.base import Sample
from erpo_core.trainer.callbacks import RecordCallback
from erpo_core.trainer.state import RunState
from tiny_model import make_tiny_model

LOUD, SILENT = 0.9, 0.95


@pytest.mark.parametrize(
    ("algorithm", "shares", "steps"),
    [
        pytest.param("erpo", [SILENT] * 19 + [LOUD] + [SILENT] * 19, [], id="no streak is long enough"),
        pytest.param("erpo", [SILENT] * 45, [20], id="once for a streak"),
        pytest.param("erpo", [SILENT] * 21 + [LOUD] + [SILENT] * 20, [20, 42], id="again for the next one"),
        pytest.param("erpo", [None] * 30, [], id="nothing was measured"),
        pytest.param("grpo", [SILENT] * 30, [], id="GRPO needs no progress"),
    ],
)
def test_a_streak_of_silent_steps_is_told_once(algorithm, shares, steps):
    records = Records()
    callback = RecordCallback(records, records, {})
    callback.trainer = SimpleNamespace(rollout_log=[], traces=[], run_state=RunState())
    for step, share in enumerate(shares, 1):
        state = SimpleNamespace(global_step=step, max_steps=100, is_world_process_zero=True)
        logs = {"loss": 0.1, "erpo/frac_silent_buckets": share}
        callback.on_log(SimpleNamespace(algorithm=algorithm), state, None, logs=logs)
    assert [(event.type, event.level, event.data["step"]) for event in records.by_kind["event"]] == [
        ("erpo.silent", "warn", step) for step in steps
    ]


def test_a_stored_answer_is_boxed_whatever_the_rewards_are(tmp_path):
    trainer = make_trainer(make_tiny_model(tmp_path / "tiny"), tmp_path / "run", max_completion_length=12, max_steps=1)
    tokenizer = trainer.processing_class
    texts = ["\\boxed{2}", "\\boxed{}", "so \\boxed{2}.", "2"] * 2
    samples = [Sample([*tokenizer(text, add_special_tokens=False)["input_ids"], 2], True) for text in texts]

    def answer(*_, **__):
        trainer._samples = samples
        return [sample.token_ids for sample in samples], None

    trainer._generate_single_turn = answer
    records = Records()
    callback = RecordCallback(records, records, {})
    trainer.add_callback(callback)
    callback.attach(trainer)
    trainer.train()
    (found,) = records.by_kind["completions"]
    assert [(row["completion"], row["boxed"]) for row in found.rows] == [(text, "{2}" in text) for text in texts]


def test_what_rewards_say_of_an_answer_is_stored_with_it(tmp_path):
    def reward(completions, log_extra, **_):
        log_extra("words", [len(text.split()) for text in completions])
        log_extra("share", [torch.tensor(0.5) for _ in completions])
        log_extra("marks", [[1, None] for _ in completions])
        log_extra("of the whole batch", ["once"])
        return [float(len(text)) for text in completions]

    tiny = make_tiny_model(tmp_path / "tiny")
    layout = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = make_trainer(tiny, tmp_path / "run", reward=reward, max_steps=2, **layout)
    records = Records()
    callback = RecordCallback(records, records, {})
    trainer.add_callback(callback)
    callback.attach(trainer)
    trainer.train()
    assert len(records.by_kind["completions"]) == 2
    for record in records.by_kind["completions"]:
        assert [row["extra"] for row in record.rows] == [
            {"words": len(row["completion"].split()), "share": 0.5, "marks": "[1, None]"} for row in record.rows
        ]
