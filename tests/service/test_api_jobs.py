"""Orders over HTTP: submitting, listing, steering, repeating; on both databases, with a real broker where one rings."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor

from celery import Celery
from db_rows import call, claim, finish, job_of, path_of, store, submit

from erpo_core.records import Progress, Result
from service.db.states import STATUSES, TERMINAL
from service.settings import RING_TASK

TRAIN = {"model": "smollm2-135m", "dataset": "data:sums.jsonl"}
ENTROPY = {"model": "smollm2-135m", "texts": [{"prompt": "1 + 1?", "response": "2"}]}
ORDERS = [
    ("/jobs/train", TRAIN, "train"),
    ("/jobs/evaluate", TRAIN, "evaluate"),
    ("/analyze/entropy", ENTROPY, "entropy"),
]
OPTIONS = {"name": "first", "tags": ["a", "b"], "priority": 3, "max_retries": 1}
NO_JOB, NO_RUN = "job_" + "0" * 32, "run_" + "0" * 32


def listed(client, path: str = "/jobs", **query) -> list[str]:
    """The ids of one page."""
    response = client.get(path, params=query)
    assert response.status_code == 200, response.text
    return [row["id"] for row in response.json()["data"]]


def refused(response, status: int, code: str) -> dict:
    body = response.json()
    assert (response.status_code, body["code"]) == (status, code), body
    assert response.headers["content-type"] == "application/problem+json"
    return body


def test_an_order_is_queued_and_found_at_its_location(api, database):
    for path, order, kind in ORDERS:
        response = api.post(path, json=order | {"job": OPTIONS})
        job = response.json()
        assert (response.status_code, response.headers["location"]) == (202, f"/jobs/{job['id']}")
        assert api.get(f"/jobs/{job['id']}").json() == job
        assert (job["kind"], job["status"], job["is_terminal"], job["attempt"]) == (kind, "queued", False, 0)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", job["created_at"])
        assert (job["name"], job["tags"], job["priority"]) == ("first", ["a", "b"], 3)
        run = api.get(job["links"]["run"]).json()
        assert (run["job_id"], run["status"], run["kind"]) == (job["id"], "queued", kind)
        owned = claim(database)
        assert (owned.job_id, owned.run_id, owned.spec) == (job["id"], job["run_id"], run["spec"])
        assert "job" not in owned.spec
        assert job_of(database, job["id"]).max_retries == 1


def test_a_dry_run_estimates_and_queues_nothing(api):
    for path, order, kind in ORDERS:
        response = api.post(path, json=order, params={"dry_run": True})
        body = response.json()
        assert (response.status_code, body["valid"], body["kind"]) == (200, True, kind)
        assert body["spec"]["model"] == "smollm2-135m"
        assert body["estimate"]["trace_bytes"] >= 0
        assert body["estimate"].get("num_problems") == (None if kind == "entropy" else 3)
        assert (body["estimate"].get("memory_bytes", 0) > 0) == (kind == "train")
    assert (listed(api), listed(api, "/runs")) == ([], [])


def test_a_dry_run_counts_the_evaluations_on_the_way(api):
    evaluated = {"eval_every": 2, "eval_benchmarks": ["data:sums.jsonl", "reasoning-gym:chain_sum?size=9"]}
    order = TRAIN | evaluated | {"max_steps": 5, "max_completion_length": 10, "eval_num_samples": 2}
    estimate = api.post("/jobs/train", json=order, params={"dry_run": True}).json()["estimate"]
    assert (estimate["eval_completions"], estimate["eval_completion_tokens"]) == (4 * 12 * 2, 4 * 12 * 2 * 10)


def test_an_order_rings_the_workers_and_a_refused_one_does_not(serve, valkey_url):
    client = serve(broker_url=valkey_url)
    assert client.post("/jobs/train", json=TRAIN | {"num_generations": 1}).status_code == 422
    key = {"Idempotency-Key": "same"}
    accepted = [client.post("/jobs/train", json=TRAIN, headers=key).json()["id"] for _ in range(2)]
    assert accepted[0] == accepted[1]
    with Celery(broker=valkey_url).connection() as connection, connection.SimpleQueue("default") as queue:
        message = queue.get(timeout=20)
    assert message.headers["task"] == RING_TASK
    assert message.payload[0] == [accepted[0]]


def test_an_order_is_taken_while_the_broker_is_away(serve):
    client = serve(broker_url="redis://127.0.0.1:1/0")
    assert client.post("/jobs/train", json=TRAIN).status_code == 202
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["checks"]["broker"]) == (200, "unreachable")


def test_orders_beyond_the_limit_are_told_to_come_back(serve):
    client = serve(max_queued_jobs=2)
    key = {"Idempotency-Key": "third"}
    first, _ = (client.post("/jobs/train", json=TRAIN).json()["id"] for _ in range(2))
    response = client.post("/jobs/train", json=TRAIN, headers=key)
    refused(response, 429, "queue_full")
    assert response.headers["retry-after"].isdigit()
    client.post(f"/jobs/{first}/cancel")
    assert client.post("/jobs/train", json=TRAIN, headers=key).status_code == 202


def test_lists_come_in_pages_newest_first(api, database):
    expected = [submit(database).id for _ in range(7)][::-1]
    seen, cursor = [], None
    for _ in range(4):
        page = api.get("/jobs", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        submit(database)  # What comes later must not shift the pages.
        seen += [row["id"] for row in page["data"]]
        cursor = page["next_cursor"]
        assert page["has_more"] == (cursor is not None)
    assert (seen, cursor) == (expected, None)
    assert len(listed(api, limit=200)) == 11


def test_every_filter_of_the_list_must_hold(api, database):
    old = submit(database, "entropy", {"model": "a"}, tags=["x", "y"])
    new = submit(database, "train", {"model": "b"}, tags=["x"])
    call(database, lambda session: setattr(session.merge(old), "created_at", old.created_at.replace(year=2020)))
    assert listed(api, kind="train") == [new.id]
    assert listed(api, status="queued", tag="x") == [new.id, old.id]
    assert listed(api, tag="y", model="b") == []
    assert listed(api, model="a") == [old.id]
    assert listed(api, created_before="2021-01-01T00:00:00Z") == [old.id]
    assert listed(api, created_after="2021-01-01T01:00:00+01:00") == [new.id]
    assert listed(api, status="failed") == []
    assert listed(api, "/runs", kind="entropy") == [old.run_id]


ILLEGAL = {
    "cancel": {"succeeded", "failed"},
    "pause": set(TERMINAL) | {"cancelling"},
    "resume": set(STATUSES) - {"paused"},
    "retry": set(STATUSES) - {"failed", "cancelled"},
}
AFTER = {
    "cancel": {"queued": "cancelled", "paused": "cancelled", "cancelled": "cancelled"},
    "pause": {"queued": "paused", "paused": "paused"},
    "resume": {"paused": "queued"},
    "retry": {"failed": "queued", "cancelled": "queued"},
}
UNDER_WAY = {"cancel": "cancelling", "pause": "pausing"}


def test_each_action_is_done_or_refused_with_the_state(api, database, job_in):
    for status in STATUSES:
        for action in ILLEGAL:
            job = job_in(status)
            _check_action(api, database, job, action)
            if job_of(database, job.id).status == "queued":  # The next claim is to be of the next job.
                api.post(f"/jobs/{job.id}/cancel")


def _check_action(api, database, job, action: str) -> None:
    before = path_of(database, job.id)
    response = api.post(f"/jobs/{job.id}/{action}")
    if job.status in ILLEGAL[action]:
        assert refused(response, 409, "illegal_transition")["state"] == job.status
        assert path_of(database, job.id) == before
        return
    expected = AFTER[action].get(job.status, UNDER_WAY.get(action))
    assert (response.status_code, response.json()["status"]) == (200, expected), (job.status, action)
    assert api.get(f"/jobs/{job.id}").json() == response.json()


def test_only_a_finished_job_can_be_deleted_and_its_run_goes_with_it(api, job_in):
    kept = []
    for status in STATUSES:
        job = job_in(status)
        response = api.delete(f"/jobs/{job.id}")
        if status not in TERMINAL:
            assert refused(response, 409, "illegal_transition")["state"] == status
            kept.append(job.id)
            continue
        assert (response.status_code, response.content) == (204, b"")
        for path in (f"/jobs/{job.id}", f"/jobs/{job.id}/events", f"/runs/{job.run_id}", f"/runs/{job.run_id}/metrics"):
            refused(api.get(path), 404, "not_found")
        refused(api.delete(f"/jobs/{job.id}"), 404, "not_found")
    assert sorted(listed(api)) == sorted(kept)
    assert len(listed(api, "/runs")) == len(kept)


def test_cancelling_tells_the_worker_how(api, job_in):
    for body, wanted in (
        (None, "cancelled"),
        ({"mode": "checkpoint"}, "cancelled"),
        ({"mode": "now"}, "cancelled_now"),
    ):
        job = job_in("running")
        assert api.post(f"/jobs/{job.id}/cancel", json=body).json()["desired_status"] == wanted
        problem = refused(api.post(f"/jobs/{job.id}/cancel", json={"mode": "soon"}), 422, "invalid_spec")
        assert problem["errors"][0]["pointer"] == "/mode"


def test_a_failed_job_is_retried_as_a_new_attempt_of_the_same_job(api, database):
    submit(database)
    owned = claim(database)
    finish(database, owned, "failed", reason="oom", error={"code": "oom", "message": "no memory", "log_tail": "Killed"})
    failed = api.get(f"/jobs/{owned.job_id}").json()
    assert (failed["status_reason"], failed["error"]["log_tail"]) == ("oom", "Killed")
    again = api.post(f"/jobs/{owned.job_id}/retry").json()
    assert (again["status"], again["error"], again["finished_at"]) == ("queued", None, None)
    assert (claim(database).attempt, path_of(database, owned.job_id)) == (
        2,
        ["queued", "starting", "failed", "queued", "starting"],
    )


def test_what_may_change_later_changes_and_the_rest_stays(api):
    job = api.post("/jobs/train", json=TRAIN | {"job": OPTIONS}).json()
    path = f"/jobs/{job['id']}"
    changed = api.patch(path, json={"name": None, "priority": -1}).json()
    assert (changed["name"], changed["priority"], changed["tags"]) == (None, -1, ["a", "b"])
    assert api.patch(path, json={"tags": []}).json()["tags"] == []
    for body in (
        {"priority": None},
        {"tags": None},
        {"tags": [""]},
        {"priority": 10},
        {"status": "succeeded"},
        {"name": "\0"},
    ):
        problem = refused(api.patch(path, json=body), 422, "invalid_spec")
        assert problem["errors"][0]["pointer"].startswith("/" + next(iter(body)))
        assert problem["errors"][0]["mend"]
    assert api.get(path).json() == changed | {"tags": []}


def test_a_repeated_order_gets_the_first_answer_and_no_second_job(api):
    key = {"Idempotency-Key": "one"}
    first = api.post("/jobs/train", json=TRAIN, headers=key)
    again = api.post("/jobs/train", json=TRAIN, headers=key)
    assert (again.status_code, again.json()) == (202, first.json())
    assert (again.headers["location"], again.headers["idempotency-replayed"]) == (first.headers["location"], "true")
    assert "idempotency-replayed" not in first.headers
    body = refused(api.post("/jobs/train", json=TRAIN | {"seed": 1}, headers=key), 422, "idempotency_key_reused")
    assert body["errors"][0]["pointer"] == "/header/Idempotency-Key"
    refused(api.post("/jobs/evaluate", json=TRAIN, headers=key), 422, "idempotency_key_reused")
    assert api.post("/jobs/train", json=TRAIN, headers={"Idempotency-Key": "two"}).json()["id"] != first.json()["id"]
    assert len(listed(api)) == 2


def test_a_refused_order_does_not_use_up_its_key(api):
    key = {"Idempotency-Key": "one"}
    for wrong in ({"num_generations": 1}, {"model": "nope"}):
        assert api.post("/jobs/train", json=TRAIN | wrong, headers=key).status_code == 422
    assert api.post("/jobs/train", json=TRAIN, headers=key).status_code == 202


def test_a_repeated_action_is_not_done_twice(api, database, job_in):
    job = job_in("failed")
    key = {"Idempotency-Key": "retry it"}
    first = api.post(f"/jobs/{job.id}/retry", headers=key)
    finish(database, claim(database), "failed")
    assert api.post(f"/jobs/{job.id}/retry", headers=key).json() == first.json()
    assert job_of(database, job.id).status == "failed"


def test_the_same_upload_with_the_same_key_is_stored_once(api):
    file = {"file": ("sums.jsonl", b'{"problem": "1 + 1?", "answer": "2"}\n')}
    key = {"Idempotency-Key": "upload"}
    first, again = (api.post("/datasets", files=file, headers=key) for _ in range(2))
    assert (first.status_code, again.status_code, again.json()) == (201, 201, first.json())
    other = {"file": ("sums.jsonl", b'{"problem": "1 + 2?", "answer": "3"}\n')}
    refused(api.post("/datasets", files=other, headers=key), 422, "idempotency_key_reused")
    assert listed(api, "/datasets") == [first.json()["id"]]
    order = TRAIN | {"dataset": first.json()["id"], "generation_batch_size": 8}
    assert api.post("/jobs/train", json=order, params={"dry_run": True}).json()["estimate"]["num_problems"] == 1


def test_of_the_same_orders_at_the_same_time_one_is_queued(api):
    def send(_):
        return api.post("/jobs/train", json=TRAIN, headers={"Idempotency-Key": "one"})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(send, range(16)))
    assert {answer.status_code for answer in answers} <= {202, 409}
    assert {answer.json()["code"] for answer in answers if answer.status_code == 409} <= {"idempotency_in_progress"}
    assert {answer.json()["id"] for answer in answers if answer.status_code == 202} == set(listed(api))
    assert len(listed(api)) == 1


def test_waiting_for_an_analysis_ends_with_its_result(api, database):
    def work():
        while (owned := claim(database)) is None:
            pass
        store(database, owned, Progress("score", 1, 1), Result({"num_tokens": 1}))
        finish(database, owned, "succeeded")

    worker = threading.Thread(target=work)
    worker.start()
    answer = api.post("/analyze/entropy", json=ENTROPY, params={"wait": 60})
    worker.join()
    assert (answer.status_code, answer.json()["result"], answer.json()["status"]) == (
        200,
        {"num_tokens": 1},
        "succeeded",
    )
    late = api.post("/analyze/entropy", json=ENTROPY, params={"wait": 0.01})
    assert (late.status_code, late.json()["status"]) == (202, "queued")
    assert late.headers["location"] == f"/jobs/{late.json()['id']}"
