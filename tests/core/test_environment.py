"""A run resumed with other libraries, threads or another machine goes on, and says what is not as it was."""

import pytest
import torch
from test_trainer import train

from erpo_core.trainer import saving
from erpo_core.trainer.environment import differences, environment
from tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def changes(records) -> list:
    return [event for event in records.by_kind["event"] if event.type == "resume.environment_changed"]


@pytest.mark.parametrize("algorithm", ["grpo", "erpo"])
def test_what_differs_at_a_resume_is_an_event_and_the_run_goes_on(tiny, tmp_path, monkeypatch, algorithm):
    here = environment()
    elsewhere = here | {"num_threads": 64, "versions": here["versions"] | {"torch": "2.12.0", "numerics": "1.0"}}
    with monkeypatch.context() as patch:
        patch.setattr(saving, "environment", lambda: elsewhere)
        first = train(tiny, tmp_path / "a", stop_after=2, algorithm=algorithm)
    assert changes(first) == []
    start = tmp_path / "a" / "checkpoints" / "checkpoint-2"
    second = train(tiny, tmp_path / "b", resume_from=start, algorithm=algorithm)
    (event,) = changes(second)
    assert event.level == "warn"
    assert event.data == {
        "num_threads": {"before": 64, "now": torch.get_num_threads()},
        "torch": {"before": "2.12.0", "now": here["versions"]["torch"]},
        "numerics": {"before": "1.0", "now": None},
    }
    assert all(name in event.message for name in event.data)
    assert [record.step for record in second.by_kind["metrics"]] == [3, 4]
    third = train(tiny, tmp_path / "c", resume_from=tmp_path / "b" / "checkpoints" / "checkpoint-4", max_steps=5)
    assert changes(third) == [], "the checkpoint holds the environment that wrote it"


def test_nothing_is_said_of_a_checkpoint_that_tells_nothing():
    assert differences({}, environment()) == {}
