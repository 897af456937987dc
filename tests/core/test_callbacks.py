"""What the records of a training say beside the metrics."""

from types import SimpleNamespace

import pytest
from test_trainer import Records

from erpo_core.trainer.callbacks import RecordCallback
from erpo_core.trainer.state import RunState

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
