"""The clients against the real service: an order that takes long is not given up, and waiting ends when it should."""

import asyncio
import threading
import time

import pytest
from db_rows import claim, finish

from service import events, submission
from service.client import AsyncErpoClient, ErpoClient, protocol

ORDER = {"model": "smollm2-135m", "dataset": "data:sums.jsonl"}


async def order(url: str, *, timeout: float):
    async with AsyncErpoClient(url, timeout=timeout) as client:
        return await client.train(**ORDER)


async def wait(url: str, **how):
    async with AsyncErpoClient(url) as client:
        return await (await client.train(**ORDER)).wait(**how)


def order_now(url: str, *, timeout: float):
    with ErpoClient(url, timeout=timeout) as client:
        return client.train(**ORDER)


def wait_now(url: str, **how):
    with ErpoClient(url) as client:
        return client.train(**ORDER).wait(**how)


ORDERS = [pytest.param(order_now, id="sync"), pytest.param(lambda *a, **k: asyncio.run(order(*a, **k)), id="async")]
WAITS = [pytest.param(wait_now, id="sync"), pytest.param(lambda *a, **k: asyncio.run(wait(*a, **k)), id="async")]


@pytest.fixture
def url(api):
    return str(api.base_url)


@pytest.mark.parametrize("ordered", ORDERS)
def test_an_order_that_is_being_worked_on_is_waited_for(api, url, ordered, monkeypatch):
    admit, admitted = submission.admit, threading.Event()

    def slowly(*args):
        assert admitted.wait(60)
        return admit(*args)

    seen = []

    def pause_before(attempt, response=None):
        seen.append(response and response.json()["code"])
        if len(seen) == 3 * protocol.MAX_TRIES:
            admitted.set()
        return 0.02

    monkeypatch.setattr(submission, "admit", slowly)
    monkeypatch.setattr(protocol, "pause_before", pause_before)
    job = ordered(url, timeout=1)
    assert job.status == "queued"
    assert [one["id"] for one in api.get("/jobs").json()["data"]] == [job.id], "ordered once"
    assert set(seen) == {None, "idempotency_in_progress"}


@pytest.mark.parametrize("ordered", ORDERS)
def test_an_order_that_is_never_done_is_given_up_in_the_end(api, url, ordered, monkeypatch):
    admit, may_go_on = submission.admit, threading.Event()
    monkeypatch.setattr(submission, "admit", lambda *args: may_go_on.wait(60) and admit(*args))
    monkeypatch.setattr(protocol, "pause_before", lambda attempt, response=None: 0.02)
    monkeypatch.setattr(protocol, "IN_PROGRESS_SECONDS", 1.5)
    try:
        with pytest.raises(protocol.ErpoApiError, match="idempotency_in_progress"):
            ordered(url, timeout=1)
    finally:
        may_go_on.set()


@pytest.mark.parametrize("waited", WAITS)
@pytest.mark.parametrize("ping_seconds", [0.1, 15.0], ids=["signs of life", "silence"])
def test_waiting_with_events_ends_after_its_timeout(url, waited, ping_seconds, monkeypatch):
    """A job that nobody works on has one event, and then none."""
    monkeypatch.setattr(events, "PING_SECONDS", ping_seconds)
    monkeypatch.setattr(protocol, "SILENCE_SECONDS", 0.5 if ping_seconds < 1 else protocol.SILENCE_SECONDS)
    seen, started = [], time.monotonic()
    with pytest.raises(TimeoutError, match="is still queued"):
        waited(url, on_event=seen.append, timeout=1.5)
    assert 1.4 < time.monotonic() - started < 8
    assert [event["type"] for event in seen] == ["job.status"]


@pytest.mark.parametrize("waited", WAITS)
@pytest.mark.parametrize("timeout", [10, 60], ids=["polled", "streamed"])
def test_what_happens_before_a_timeout_is_heard_of(url, database, waited, timeout):
    seen = []

    def work(event):
        seen.append(event["data"].get("to"))
        if seen == ["queued"]:
            finish(database, claim(database), "succeeded")

    assert waited(url, on_event=work, timeout=timeout).status == "succeeded"
    assert seen == ["queued", "starting", "succeeded"]


@pytest.mark.parametrize("waited", WAITS)
def test_waiting_without_events_ends_after_its_timeout(url, waited):
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="is still queued"):
        waited(url, timeout=0.7)
    assert time.monotonic() - started < 8
