"""One order evaluates several checkpoints of a run: each is an evaluation like any other, all of one job."""

import pytest
from db_rows import call, claim, finish, job_of, run_of, store, submit
from test_api_evaluations import answer, refused

from erpo_core.evaluation_identity import evaluation_identity
from erpo_core.evaluation_summary import summarise
from erpo_core.records import Checkpoint, Completions, Event, Progress, Resolved, Result
from erpo_core.specs.evaluate import EvaluateSpec
from service.db import jobs

ORDER = {"dataset": "data:sums.jsonl", "num_samples": 2}
REWARDS = {10: 0.2, 20: 0.9, 30: 0.4}


@pytest.fixture
def trained(database):
    """The id of a finished training with three checkpoints, the second of them the best."""
    submit(database)
    owned = claim(database)
    store(database, owned, *(Checkpoint(step, f"/x/{step}", [], {"reward": r}) for step, r in REWARDS.items()))
    finish(database, owned, "succeeded")
    return owned.run_id


def order(api, run_id, *checkpoints, **more):
    return api.post("/jobs/evaluate", json=ORDER | {"model": {"run": run_id, "checkpoints": checkpoints}} | more)


def evaluate(database, rights) -> list[str]:
    """What a child reports of a job with several runs: run i has ``rights[i]`` right answers of two to one problem."""
    owned = claim(database)
    run_ids = job_of(database, owned.job_id).run_ids
    for run_id, right in zip(run_ids, rights, strict=True):
        spec = EvaluateSpec.model_validate(run_of(database, run_id).spec)
        rows = [answer(0, sample, right) for sample in range(2)]
        resolved = {"model_digest": "base", "adapter_digest": run_id, "dataset_digest": "d", "template_digest": "t"}
        resolved["identity"] = evaluation_identity(spec, resolved, "0.9.0+3")
        store(database, owned, Progress("generate", 1, 2), Resolved(resolved, run_id), Completions(0, rows, run_id))
        store(database, owned, Result(summarise(rows, spec), run_id))
    finish(database, owned, "succeeded")
    return run_ids


def test_each_checkpoint_is_an_evaluation_of_its_own(api, database, trained):
    job = order(api, trained, 10, "best", "last", job={"name": "curve"}).json()
    assert job["run_id"] == job["run_ids"][0]
    assert api.get(f"/jobs/{job['id']}").json() == job
    assert [one["run_ids"] for one in api.get("/jobs", params={"kind": "evaluate"}).json()["data"]] == [job["run_ids"]]
    models = [api.get(f"/evaluations/{run}").json()["spec"]["model"] for run in job["run_ids"]]
    assert models == [{"run": trained, "checkpoint": wanted} for wanted in (10, "best", "last")]
    listed = api.get(f"/runs/{trained}/evaluations").json()["data"]
    assert {one["id"] for one in listed} == set(job["run_ids"])
    assert {one["job_id"] for one in listed} == {job["id"]}


def test_each_is_read_taken_apart_compared_and_reported_like_any_other(api, database, trained):
    order(api, trained, 10, 20, 30)
    runs = evaluate(database, (0, 1, 2))
    for run, acc in zip(runs, (0, 0.5, 1), strict=True):
        body = api.get(f"/evaluations/{run}").json()
        assert (body["status"], body["result"]["acc"]["value"]) == ("succeeded", acc)
        assert api.get(f"/evaluations/{run}", params={"pass_at": "2"}).json()["result"]["num_answers"] == 2
        assert len(api.get(f"/evaluations/{run}/items").json()["data"]) == 2
        assert api.get(f"/evaluations/{run}/problems").json()["data"][0]["num_right"] == 2 * acc
    compared = api.get("/evaluations/compare", params={"evaluation": runs}).json()
    assert [row["acc"]["value"] for row in compared["benchmarks"][0]["comparisons"]] == [0.5, 1]
    table = api.get("/evaluations/report", params={"evaluation": runs}).json()
    assert [row["label"] for row in table["rows"]] == [f"{trained} @ {step}" for step in (10, 20, 30)]


def test_one_that_is_done_can_be_compared_while_the_job_goes_on(api, database, trained):
    order(api, trained, 10, 20)
    job = claim(database)
    first, second = job_of(database, job.job_id).run_ids
    rows = [answer(0, sample, 1) for sample in range(2)]
    spec = EvaluateSpec.model_validate(run_of(database, first).spec)
    identity = evaluation_identity(spec, {"dataset_digest": "d"}, "0.9.0+3")
    store(database, job, Resolved({"identity": identity}, first), Completions(0, rows, first))
    store(database, job, Result(summarise(rows, spec), first))
    assert api.get("/evaluations/report", params={"evaluation": first}).status_code == 200
    detail = refused(api.get("/evaluations/report", params={"evaluation": second}), "wait")
    assert "has no result: it is running" in detail


def test_a_record_of_a_run_of_another_job_is_refused(database, trained):
    alien = submit(database, "evaluate").run_id
    own = submit(database, "evaluate", priority=9)
    owned = claim(database)
    assert owned.job_id == own.id
    with pytest.raises(ValueError, match=alien):
        store(database, owned, Result({"acc": 1}, alien))
    assert run_of(database, alien).result is None


def test_a_job_may_wait_for_any_of_the_runs(api, database, trained):
    last = order(api, trained, 10, 20).json()["run_ids"][-1]
    waiting = submit(database, "entropy", depends_on=[last], priority=9)
    evaluate(database, (0, 1))
    assert claim(database).job_id == waiting.id


def test_a_deleted_job_takes_all_of_its_evaluations_with_it(api, database, trained):
    order(api, trained, 10, 20)
    runs = evaluate(database, (0, 1))
    job_id = run_of(database, runs[0]).job_id
    call(database, jobs.delete_job, job_id)
    assert [api.get(f"/evaluations/{run}").status_code for run in runs] == [404, 404]
    assert api.get(f"/runs/{trained}/evaluations").json()["data"] == []


def test_where_a_training_is_deleted_what_was_trained_further_can_be_ordered_and_it_cannot(api, database, trained):
    submit(database, spec={"model": {"run": trained, "checkpoint": 20}})
    further = claim(database)
    store(database, further, Checkpoint(5, "/x/5", []))
    finish(database, further, "succeeded")
    assert api.delete(f"/jobs/{run_of(database, trained).job_id}").status_code == 204
    assert api.post("/jobs/evaluate", json=ORDER | {"model": {"run": further.run_id}}).status_code == 202
    response = api.post("/jobs/evaluate", json=ORDER | {"model": {"run": trained}})
    assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, "/model/run")


def test_checkpoints_of_a_training_that_runs_are_waited_for(api, database):
    training = submit(database).run_id
    job = order(api, training, 10, 20).json()
    assert (job["depends_on"], job["status_reason"]) == ([training], "waiting_for_dependency")


def test_a_dry_run_counts_the_answers_of_all(api, trained):
    body = api.post(
        "/jobs/evaluate",
        json=ORDER | {"model": {"run": trained, "checkpoints": [10, 30]}},
        params={"dry_run": True},
    ).json()
    assert body["estimate"]["completions"] == 2 * 3 * 2
    assert api.get("/jobs", params={"kind": "evaluate"}).json()["data"] == []


def test_a_checkpoint_that_made_room_for_later_ones_is_refused_and_no_longer_listed(api, database):
    submit(database)
    owned = claim(database)
    rows = [Checkpoint(step, f"/x/{step}", [], {"reward": reward}) for step, reward in REWARDS.items()]
    store(database, owned, *rows, Event("checkpoint.removed", "it makes room", data={"step": 10}))
    finish(database, owned, "succeeded")
    listed = api.get(f"/runs/{owned.run_id}/checkpoints").json()["data"]
    assert [row["step"] for row in listed] == [20, 30]
    response = order(api, owned.run_id, 10, "best", "last")
    (error,) = response.json()["errors"]
    assert (response.status_code, error["pointer"]) == (422, "/model/checkpoints/0")
    assert error["mend"] == "write one of [20, 30], `last` or `best`"
    assert order(api, owned.run_id, "best", "last").status_code == 202


def test_wrong_checkpoints_are_refused_before_anything_is_queued(api, trained):
    for checkpoints, pointer, mend in (
        ([10, 40], "/model/checkpoints/1", "[10, 20, 30], `last` or `best`"),
        ([20, "best"], "/model/checkpoints/1", "each checkpoint once"),
        ([10, 10], "/model/checkpoints", "each once"),
        ([], "/model/checkpoints", "at least 1"),
        ([10, "final"], "/model/checkpoints/1", "'last' or 'best'"),
        ([10, -1], "/model/checkpoints/1", "at least 0"),
        (list(range(33)), "/model/checkpoints", "at most 32"),
    ):
        response = order(api, trained, *checkpoints)
        assert response.status_code == 422, response.text
        (error,) = response.json()["errors"]
        assert error["pointer"] == pointer
        assert mend in error["mend"]
    for path in ("/jobs/train", "/analyze/perturbation"):
        body = {"dataset": "data:sums.jsonl", "model": {"run": trained, "checkpoints": [10]}}
        response = api.post(path, json=body)
        assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, "/model/checkpoints")
    assert api.get("/jobs", params={"kind": "evaluate"}).json()["data"] == []
