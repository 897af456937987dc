"""The table from what was seen to what a job becomes."""

import pytest

from erpo_core.errors import RunError
from erpo_core.records import Ended
from workers.child.__main__ import failure_code, failure_message
from workers.outcome import Order, classify

DONE, STOPPED, FAILED = Ended("succeeded"), Ended("stopped"), Ended("failed", "nonfinite_loss", "loss is NaN")


@pytest.mark.parametrize(
    ("order", "ended", "returncode", "expected"),
    [
        pytest.param(Order.NONE, DONE, 0, ("succeeded", None), id="done"),
        pytest.param(Order.CANCEL, DONE, 0, ("succeeded", None), id="done before the cancel arrived"),
        pytest.param(Order.NONE, DONE, -9, ("succeeded", None), id="killed after its last word"),
        pytest.param(Order.NONE, FAILED, 0, ("failed", "nonfinite_loss"), id="failed"),
        pytest.param(Order.PAUSE, FAILED, 0, ("failed", "nonfinite_loss"), id="failed while pausing"),
        pytest.param(Order.CANCEL, STOPPED, 0, ("cancelled", "user_request"), id="cancelled"),
        pytest.param(Order.CANCEL_NOW, None, -9, ("cancelled", "user_request"), id="cancelled now"),
        pytest.param(Order.PAUSE, STOPPED, 0, ("paused", "user_request"), id="paused"),
        pytest.param(Order.PAUSE, None, -9, ("paused", "user_request"), id="killed at the end of the grace"),
        pytest.param(Order.LEAVE, STOPPED, 0, ("requeued", "worker_stopped"), id="worker leaves"),
        pytest.param(Order.TIMEOUT, STOPPED, 0, ("failed", "timeout"), id="time limit"),
        pytest.param(Order.REFUSED, None, -9, ("failed", "record_refused"), id="bad record"),
        pytest.param(Order.NONE, STOPPED, 0, ("failed", "child_killed"), id="foreign SIGTERM, heard"),
        pytest.param(Order.NONE, None, -15, ("failed", "child_killed"), id="foreign SIGTERM, not heard"),
        pytest.param(Order.NONE, None, -11, ("failed", "child_killed"), id="segmentation fault"),
        pytest.param(Order.NONE, None, 3, ("failed", "child_crashed"), id="exit code"),
        pytest.param(Order.NONE, None, 0, ("failed", "child_crashed"), id="left without a word"),
    ],
)
def test_an_attempt_becomes(order, ended, returncode, expected):
    outcome = classify(order, ended, returncode, out_of_memory=False)
    assert (outcome.outcome, outcome.reason) == expected


def test_a_kill_is_out_of_memory_only_if_the_machine_counted_one():
    assert classify(Order.NONE, None, -9, out_of_memory=True).reason == "oom"
    assert classify(Order.NONE, None, -9, out_of_memory=False).reason == "child_killed"
    assert classify(Order.NONE, None, -11, out_of_memory=True).reason == "child_killed"


@pytest.mark.parametrize(
    ("ended", "returncode"),
    [
        pytest.param(Ended("failed", "failed", "RuntimeError: Connection closed by peer"), 1, id="its peer says so"),
        pytest.param(None, 1, id="its launcher has ended"),
    ],
)
def test_of_several_processes_one_that_is_killed_for_memory_is_the_reason(ended, returncode):
    several = {"num_processes": 2, "out_of_memory": True}
    assert classify(Order.NONE, ended, returncode, **several).reason == "oom"
    assert classify(Order.NONE, ended, returncode, **several | {"out_of_memory": False}).reason != "oom"
    assert classify(Order.NONE, ended, returncode, **several | {"num_processes": 1}).reason != "oom"
    assert classify(Order.NONE, FAILED, returncode, **several).reason == "nonfinite_loss"


def test_every_failure_has_a_code_and_a_message():
    for returncode in (-9, -11, 0, 1):
        outcome = classify(Order.NONE, None, returncode, out_of_memory=False)
        assert outcome.code == outcome.reason
        assert outcome.message


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError("x"), "oom"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "oom"),
        (RuntimeError("shapes differ"), "failed"),
        (ValueError("out of memory of the past"), "failed"),
        (RunError("loss is NaN", code="nonfinite_loss"), "nonfinite_loss"),
    ],
)
def test_an_exception_becomes_a_code(error, code):
    assert failure_code(error) == code
    assert str(error).splitlines()[0] in failure_message(error)
