"""The history of a job over HTTP: pages, and the live stream with its resumption and its end."""

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor

from db_rows import call, claim, finish, history, job_of, store, submit

from erpo_core.records import Metrics, Progress
from service.client import ErpoClient
from service.db import claims, jobs
from service.db.states import ACTIVE, STATUSES, TERMINAL

STREAM = {"Accept": "text/event-stream"}


@contextlib.contextmanager
def listening(client, job_id: str, **headers):
    """The blocks of the job's stream, each as a dictionary of its fields."""
    with client.stream("GET", f"/jobs/{job_id}/events", headers=STREAM | headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        yield _blocks(response.iter_lines())


def _blocks(lines):
    block = {}
    for line in lines:
        if line:
            name, _, value = line.partition(": ")
            block[name] = value
        elif block:
            yield block
            block = {}


def take(blocks, count: int) -> list[dict]:
    """The next events, of which the stream's own fields say what the envelope says."""
    events = []
    while len(events) < count:
        block = next(blocks)
        if "data" not in block:
            continue
        events.append(json.loads(block["data"]))
        assert (block["id"], block["event"]) == (str(events[-1]["seq"]), events[-1]["type"])
    return events


def rest(blocks) -> list[dict]:
    """What comes until the stream ends, without its last word, which is ``end``."""
    found = [block for block in blocks if "data" in block]
    assert found.pop() == {"event": "end", "data": "{}"}
    return [json.loads(block["data"]) for block in found]


def stored(client, job_id: str) -> list[dict]:
    return client.get(f"/jobs/{job_id}/events", params={"limit": 200}).json()["data"]


def end(database, job_id: str) -> None:
    """Whatever state the job is in, it ends."""
    job = job_of(database, job_id)
    if job.status in ACTIVE:
        call(database, claims.finish_attempt, job_id, job.attempt, outcome="cancelled")
    else:
        call(database, jobs.request_cancel, job_id)


def test_a_stream_tells_all_from_the_beginning_and_ends_with_the_job(api, database, job_in):
    for status in STATUSES:
        job = job_in(status)
        with listening(api, job.id) as blocks:
            before = take(blocks, job.event_seq)
            assert before == stored(api, job.id)
            assert _path(before)[-1] == status
            if status not in TERMINAL:
                end(database, job.id)
            after = rest(blocks)
        assert before + after == stored(api, job.id)
        assert [event["seq"] for event in before + after] == list(range(1, job_of(database, job.id).event_seq + 1))
        assert _path(after) == ([] if status in TERMINAL else ["cancelled"])


def _path(events: list[dict]) -> list[str]:
    return [event["data"]["to"] for event in events if event["type"] == "job.status"]


def test_a_stream_follows_what_happens_meanwhile(api, database):
    job = submit(database)
    with listening(api, job.id) as blocks:
        assert [event["data"]["to"] for event in take(blocks, 1)] == ["queued"]
        owned = claim(database)
        assert [event["data"]["to"] for event in take(blocks, 1)] == ["starting"]
        store(database, owned, Metrics(1, {"reward": None}), Metrics(2, {"reward": 0.5}), Progress("train", 2, 9))
        running, metrics, progress = take(blocks, 3)
        assert running["data"]["to"] == "running"
        assert (metrics["data"]["step_min"], metrics["data"]["step_max"], metrics["data"]["names"]) == (
            1,
            2,
            ["reward"],
        )
        assert (progress["data"]["done"], progress["attempt"], progress["run_id"]) == (2, 1, job.run_id)
        finish(database, owned, "failed", reason="oom", error={"code": "oom", "message": "no memory"})
        (failed,) = rest(blocks)
    assert (failed["level"], failed["data"]["reason"]) == ("error", "oom")


def test_a_listener_that_comes_back_misses_and_repeats_nothing(api, database, job_in):
    job = job_in("running")
    with listening(api, job.id) as blocks:
        seen = take(blocks, 2)
    store(database, claims.Claim(job.id, job.run_id, job.attempt, job.kind, {}, None), Progress("train", 5, 10))
    with listening(api, job.id, **{"Last-Event-ID": str(seen[-1]["seq"])}) as blocks:
        seen += take(blocks, job.event_seq + 1 - len(seen))
    end(database, job.id)
    with listening(api, job.id, **{"Last-Event-ID": str(seen[-1]["seq"])}) as blocks:
        seen += rest(blocks)
    assert seen == stored(api, job.id)
    with listening(api, job.id, **{"Last-Event-ID": str(seen[-1]["seq"])}) as blocks:
        assert rest(blocks) == []


def test_a_retried_job_goes_on_in_its_stream(api, database, job_in):
    job = job_in("failed")
    call(database, jobs.retry_job, job.id)
    with listening(api, job.id) as blocks:
        assert take(blocks, job.event_seq + 1)[-1]["data"]["to"] == "queued"
        finish(database, claim(database), "succeeded")
        assert [event["data"]["to"] for event in rest(blocks)] == ["starting", "succeeded"]


def test_every_listener_gets_everything_however_late_it_comes(api, database):
    job = submit(database)
    owned = claim(database)

    def listen(after: int) -> list[int]:
        with listening(api, job.id, **{"Last-Event-ID": str(after)}) as blocks:
            return [event["seq"] for event in rest(blocks)]

    with ThreadPoolExecutor(6) as pool:
        listeners = [pool.submit(listen, after) for after in (0, 0, 1, 2, 300, 900)]
        for part in range(4):
            # More than the window that listeners share.
            store(database, owned, *(Progress("train", part * 200 + done, 800) for done in range(200)))
        finish(database, owned, "succeeded")
        heard = [listener.result(60) for listener in listeners]
    last = job_of(database, job.id).event_seq
    assert last > 800
    assert heard == [list(range(after + 1, last + 1)) for after in (0, 0, 1, 2, 300, 900)]


def test_events_are_pages_where_no_stream_is_asked_for(api, database, job_in):
    job = job_in("succeeded")
    expected = [(event.seq, event.type, event.id) for event in history(database, job.id)]
    path, found, cursor = f"/jobs/{job.id}/events", [], None
    for _ in range(len(expected)):
        page = api.get(path, params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        found += [(event["seq"], event["type"], event["id"]) for event in page["data"]]
        cursor = page["next_cursor"]
        assert page["has_more"] == (cursor is not None)
        if cursor is None:
            break
    assert found == expected
    assert [event["seq"] for event in api.get(path, params={"after": 2}).json()["data"]] == [
        seq for seq, *_ in expected if seq > 2
    ]
    assert api.get(path, params={"after": 2**62}).json()["data"] == []


def test_a_place_that_is_none_is_refused(api, job_in):
    path = f"/jobs/{job_in('succeeded').id}/events"
    for value in ("x", "-1", "1.5", "9" * 19, "²"):
        for pointer, answer in {
            "/header/Last-Event-ID": api.get(path, headers=STREAM | {"Last-Event-ID": value.encode()}),
            "/query/cursor": api.get(path, params={"cursor": value}),
        }.items():
            assert (answer.status_code, answer.json()["code"]) == (400, "invalid_cursor")
            assert [(error["pointer"], bool(error["mend"])) for error in answer.json()["errors"]] == [(pointer, True)]


def test_the_client_follows_a_job_to_its_end(api, database):
    with ErpoClient(str(api.base_url)) as client:
        handle = client.train(model="smollm2-135m", dataset="data:sums.jsonl")
        seen = []

        def work(event):
            seen.append(event)
            if event["data"].get("to") == "queued":
                owned = claim(database)
                store(database, owned, Progress("train", 1, 1))
                finish(database, owned, "succeeded")

        assert handle.wait(on_event=work).status == "succeeded"
    assert seen == stored(api, handle.id)
