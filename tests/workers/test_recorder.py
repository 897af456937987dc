"""The record socket: both real ends, a function in place of the database."""

import os
import stat
import threading
import time

from erpo_core.errors import FencedError
from erpo_core.records import MAX_HEADER_BYTES, Checkpoint, Completions, Ended, Metrics, Trace, encode_frame, to_wire
from workers.child.channel import Channel
from workers.processes import boottime
from workers.recorder import BUFFER_RECORDS, Recorder


def wait_for(condition, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


def test_records_arrive_in_order_and_closing_waits_for_the_last():
    written = []
    with Recorder(written.extend) as recorder:
        channel = Channel(str(recorder.path))
        for step in range(700):
            channel.emit(Metrics(step, {"reward": float("nan")}))
        channel.emit(Trace(1, {"num_tokens": 3}, b"\x00\x01"))
        channel.emit(Ended("succeeded"))
        channel.close()
        assert [record.step for record in written[:700]] == list(range(700))
        assert written[0].values == {"reward": None}
        assert written[700].payload == b"\x00\x01"
        assert recorder.ended == Ended("succeeded")


def test_a_checkpoint_is_in_the_database_when_the_child_goes_on():
    """It deletes older ones then."""
    written, may_write = [], threading.Event()

    def apply(records):
        may_write.wait(5)
        written.extend(records)

    with Recorder(apply) as recorder:
        channel = Channel(str(recorder.path))
        channel.emit(Metrics(1, {"reward": 1.0}))
        threading.Timer(0.5, may_write.set).start()
        channel.emit(Checkpoint(1, "checkpoint-1", []))
        assert [record.kind for record in written] == ["metrics", "checkpoint"]
        channel.close()


def test_more_answers_than_a_frame_holds_arrive_as_several_records_of_their_step():
    rows = [{"prompt_id": "p", "sample": sample, "completion": "é" * 2**20} for sample in range(11)]
    assert len(encode_frame(to_wire(Completions(3, rows))[0])) > 2 * MAX_HEADER_BYTES
    written = []
    with Recorder(written.extend) as recorder:
        channel = Channel(str(recorder.path), on_lost=lambda reason: None)
        sent = (Completions(3, rows, "run_1"), Ended("succeeded"))
        threading.Thread(target=lambda: [channel.emit(record) for record in sent], daemon=True).start()
        assert wait_for(lambda: recorder.ended or recorder.refused, 20)
        assert recorder.refused is None
        channel.close()
    *parts, _ = written
    assert {(part.step, part.run_id) for part in parts} == {(3, "run_1")}
    assert [row for part in parts for row in part.rows] == rows


def test_the_socket_is_private():
    with Recorder(lambda records: None) as recorder:
        assert stat.S_IMODE(os.stat(recorder.path).st_mode) == 0o600
        assert stat.S_IMODE(os.stat(recorder.path.parent).st_mode) == 0o700
        assert len(str(recorder.path)) < 100
    assert not recorder.path.parent.exists()


def test_with_the_database_away_the_child_is_held_back_and_nothing_is_lost():
    written, is_away = [], threading.Event()
    is_away.set()

    def apply(records):
        if is_away.is_set():
            raise ConnectionError("away")
        written.extend(records)

    with Recorder(apply) as recorder:
        channel = Channel(str(recorder.path))
        emitted = []

        def emit():
            for step in range(9000):
                channel.emit(Metrics(step, {"reward": 1.0}))
                emitted.append(step)

        thread = threading.Thread(target=emit, daemon=True)
        thread.start()
        time.sleep(0.7)
        assert BUFFER_RECORDS <= len(emitted) < 9000
        assert not written
        is_away.clear()
        thread.join(20)
        channel.close()
    assert [record.step for record in written] == list(range(9000))


def test_a_fenced_attempt_hears_nothing_more_and_the_recorder_says_so():
    def apply(records):
        raise FencedError("another attempt")

    lost = []
    with Recorder(apply) as recorder:
        channel = Channel(str(recorder.path), on_lost=lost.append)
        channel.emit(Metrics(1, {"reward": 1.0}))
        assert wait_for(lambda: recorder.fenced)
    assert wait_for(lambda: lost)


def test_a_record_that_cannot_be_stored_is_named():
    def apply(records):
        raise KeyError("prompt_id")

    with Recorder(apply) as recorder:
        Channel(str(recorder.path), on_lost=lambda reason: None).emit(Metrics(1, {"reward": 1.0}))
        assert wait_for(lambda: recorder.refused)
        assert "prompt_id" in recorder.refused


def test_the_watchdog_ends_the_attempt_when_the_permit_runs_out():
    lost = []
    with Recorder(lambda records: None) as recorder:
        recorder.permit(boottime() + 0.3)
        channel = Channel(str(recorder.path), on_lost=lost.append)
        time.sleep(0.15)
        assert not lost
        assert wait_for(lambda: lost)
        assert "permit" in lost[0]
        channel._closing = True


def test_the_watchdog_ends_the_attempt_when_the_recorder_is_gone():
    lost = []
    with Recorder(lambda records: None) as recorder:
        Channel(str(recorder.path), on_lost=lost.append)
        assert wait_for(lambda: recorder._connection is not None)
    assert wait_for(lambda: lost)


def test_a_renewed_permit_lets_the_child_go_on():
    lost = []
    with Recorder(lambda records: None) as recorder:
        channel = Channel(str(recorder.path), on_lost=lost.append)
        for _ in range(5):
            recorder.permit(boottime() + 0.4)
            time.sleep(0.15)
        assert not lost
        channel.close()


def test_a_child_that_never_connects_leaves_nothing_to_drain():
    with Recorder(lambda records: None) as recorder:
        assert recorder.drain(2)
