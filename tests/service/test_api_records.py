"""What a job has left, over HTTP: metrics, traces, answers, checkpoints, events live and stored."""

import csv
import io
import math
import re
import tarfile

import numpy as np
import pytest
from db_rows import call, claim, finish, store, submit
from fastapi.routing import APIRoute
from pydantic import TypeAdapter

from erpo_core.codec import decode_trace, encode_trace
from erpo_core.records import Checkpoint, Completions, Metrics, Progress, Resolved, Result, Trace
from service.app import create_app
from service.db import claims
from service.db.records import append_log
from service.settings import Settings

SIZE = 600
SPIKE = 137
REWARDS = {step: 50.0 if step == SPIKE else math.sin(step / 10) for step in range(1, 201)}


def columns(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {"token_ids": rng.integers(0, 50_000, SIZE), "rank": rng.integers(0, 70_000, SIZE)}
    return found | {name: rng.normal(size=SIZE) for name in ("entropy", "logp", "progress", "psi")}


def trace(step: int, sample: int) -> Trace:
    pivots = [{"position": 10 * sample + i, "entropy": 2.0 - i - sample / 10, "token": "wait"} for i in range(2)]
    meta = {"prompt_id": "p0", "group": 0, "sample": sample, "prompt": "1 + 1?", "completion": "2", "num_tokens": SIZE}
    meta |= {"tokens": [f"t{i}" for i in range(SIZE)], "stats": {"h_mean": 0.5, "h_max": None}, "group_stats": {}}
    meta |= {"histogram": [SIZE - 1, *[0] * 62, 1], "pivots": pivots, "reward": 1.0, "advantage": -0.5}
    return Trace(step, meta, encode_trace(columns(sample)))


def answers(step: int, count: int) -> Completions:
    verdicts = ("right", "wrong")
    rows = [
        {"prompt_id": "p0", "group": 0, "sample": i, "prompt": "1 + 1?", "completion": f"<b>{i}</b>", "reward": i / 2}
        | {"rewards": {"accuracy": None if i else 1.0}, "verdict": verdicts[i % 2], "num_tokens": 3}
        | ({"extra": {"words": i}} if i else {})
        for i in range(count)
    ]
    return Completions(step, rows)


@pytest.fixture
def owned(database, tmp_path):
    """A training that has recorded something of everything."""
    folder = tmp_path / "artifacts" / "step-200"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"w" * 1000)
    submit(database)
    owned = claim(database)
    files = [{"path": "adapter_model.safetensors", "size": 1000, "sha256": "0" * 64}]
    store(database, owned, Resolved({"device": "cpu"}), *(Metrics(step, {"reward": y}) for step, y in REWARDS.items()))
    store(database, owned, Metrics(200, {"kl": None, "erpo/gate": 0.25}), answers(100, 3), answers(200, 4))
    store(database, owned, trace(100, 0), trace(200, 1), Checkpoint(200, str(folder), files), Result({"steps": 200}))
    return owned


def rows(client, path: str, **query) -> list[dict]:
    """Every row of a list, read page by page."""
    found, cursor = [], None
    while True:
        page = client.get(path, params=query | ({"cursor": cursor} if cursor else {})).json()
        found += page["data"]
        cursor = page["next_cursor"]
        if not page["has_more"]:
            return found


def test_metrics_are_columns_of_what_was_stored(api, owned):
    path = f"/runs/{owned.run_id}/metrics"
    body = api.get(path).json()
    assert (body["run_id"], body["status"], sorted(body["series"])) == (
        owned.run_id,
        "running",
        ["erpo/gate", "kl", "reward"],
    )
    reward = body["series"]["reward"]
    assert (reward["step"], reward["value"]) == (list(REWARDS), list(REWARDS.values()))
    assert (reward["total_points"], reward["downsampled"]) == (200, False)
    assert (body["series"]["kl"]["step"], body["series"]["kl"]["value"]) == ([200], [None])
    part = api.get(path, params={"names": "reward, loss", "step_min": 10, "step_max": 12}).json()["series"]
    assert {name: series["step"] for name, series in part.items()} == {"reward": [10, 11, 12]}
    assert api.get(path, params={"step_min": 12, "step_max": 10}).json()["series"] == {}


@pytest.mark.parametrize(("name", "mend"), [("reword", "`reward`"), ("erpo/gates", "`erpo/gate`"), ("?", "leave")])
def test_a_metric_that_no_run_has_is_refused(api, owned, name, mend):
    response = api.get(f"/runs/{owned.run_id}/metrics", params={"names": f"reward,{name}"})
    [error] = response.json()["errors"]
    assert (response.status_code, error["pointer"]) == (422, "/query/names")
    assert mend in error["mend"]


def test_few_points_keep_every_spike_and_the_last_value(api, owned):
    query = {"names": "reward", "max_points": 7}
    series = api.get(f"/runs/{owned.run_id}/metrics", params=query).json()["series"]["reward"]
    assert len(series["step"]) == len(series["value"]) == len(series["min"]) == len(series["max"]) == 7
    assert (max(series["max"]), min(series["min"])) == (50.0, min(REWARDS.values()))
    assert (series["step"][-1], series["value"][-1]) == (200, REWARDS[200])
    assert (series["total_points"], series["downsampled"]) == (200, True)


def test_smoothing_stands_beside_the_raw_values(api, owned):
    query = {"names": "reward", "smoothing": 0.9}
    series = api.get(f"/runs/{owned.run_id}/metrics", params=query).json()["series"]["reward"]
    state, expected = REWARDS[1], []
    for value in REWARDS.values():
        state = 0.9 * state + 0.1 * value
        expected.append(state)
    assert series["value"] == list(REWARDS.values())
    np.testing.assert_allclose(series["smoothed"], expected)


def test_metrics_are_csv_where_that_is_asked_for(api, owned):
    response = api.get(f"/runs/{owned.run_id}/metrics", headers={"Accept": "text/csv"})
    assert response.headers["content-type"] == "text/csv; charset=utf-8"
    table = list(csv.DictReader(io.StringIO(response.text)))
    assert {int(row["step"]): float(row["value"]) for row in table if row["name"] == "reward"} == REWARDS
    assert [row["value"] for row in table if row["name"] == "kl"] == [""]


def test_a_trace_is_read_as_it_was_stored(api, owned):
    sequences = rows(api, f"/runs/{owned.run_id}/traces", limit=1)
    assert [(row["n"], row["step"], row["num_tokens"]) for row in sequences] == [(0, 100, SIZE), (1, 200, SIZE)]
    assert (sequences[0]["reward"], sequences[0]["stats"]) == (1.0, {"h_mean": 0.5, "h_max": None})
    assert [row["n"] for row in rows(api, f"/runs/{owned.run_id}/traces", step=200)] == [1]
    stored = decode_trace(encode_trace(columns(1)))
    body = api.get(f"/runs/{owned.run_id}/traces/1/tokens").json()
    assert (body["token_ids"], len(body["tokens"])) == (stored.pop("token_ids").tolist(), SIZE)
    assert set(body["channels"]) == set(stored)
    for name, values in stored.items():
        np.testing.assert_array_equal(np.array(body["channels"][name], values.dtype), values, err_msg=name)
    assert [pivot["position"] for pivot in body["pivots"]] == [10, 11]


def test_a_range_of_a_trace_is_cut_to_the_sequence(api, owned):
    path = f"/runs/{owned.run_id}/traces/1/tokens"
    entropy = decode_trace(encode_trace(columns(1)))["entropy"]
    for query, start, end in (
        ({"start": 250, "end": 260}, 250, 260),
        ({"start": 590, "end": 9999}, 590, SIZE),
        ({"start": 9999}, SIZE, SIZE),
        ({"start": 20, "end": 10}, 20, 20),
    ):
        body = api.get(path, params=query | {"channels": "entropy"}).json()
        assert (body["start"], body["end"], list(body["channels"])) == (start, end, ["entropy"])
        assert body["tokens"] == [f"t{i}" for i in range(start, end)]
        np.testing.assert_array_equal(np.array(body["channels"]["entropy"], "f4"), entropy[start:end])
    octets = api.get(
        path, params={"channels": "psi,entropy", "start": 5}, headers={"Accept": "application/octet-stream"}
    )
    assert (octets.headers["x-channels"], octets.headers["x-tokens"]) == ("psi,entropy", f"5-{SIZE}")
    np.testing.assert_array_equal(np.frombuffer(octets.content, "<f4")[SIZE - 5 :], entropy[5:].astype("<f4"))
    problem = api.get(path, params={"channels": "entropy,joy"})
    assert (problem.status_code, problem.json()["errors"][0]["pointer"]) == (422, "/query/channels")
    assert "psi" in problem.json()["errors"][0]["mend"]


def test_pivots_and_histogram_are_of_the_whole_run(api, owned):
    pivots = api.get(f"/runs/{owned.run_id}/cdps", params={"top": 3}).json()["data"]
    assert [(pivot["n"], pivot["position"]) for pivot in pivots] == [(0, 0), (1, 10), (0, 1)]
    histogram = api.get(f"/runs/{owned.run_id}/histogram").json()
    assert histogram["counts"] == [2 * SIZE - 2, *[0] * 62, 2]
    assert (histogram["num_sequences"], histogram["num_tokens"]) == (2, 2 * SIZE)
    assert (len(histogram["edges"]), histogram["edges"][0], histogram["edges"][-1]) == (65, 0.0, None)


def test_answers_are_listed_by_step(api, owned):
    path = f"/runs/{owned.run_id}/completions"
    assert [(row["step"], row["sample"]) for row in rows(api, path, limit=2)] == [
        *((100, sample) for sample in range(3)),
        *((200, sample) for sample in range(4)),
    ]
    late = rows(api, path, step=200)
    assert [(row["completion"], row["reward"], row["rewards"], row["extra"]) for row in late[:2]] == [
        ("<b>0</b>", 0.0, {"accuracy": 1.0}, {}),
        ("<b>1</b>", 0.5, {"accuracy": None}, {"words": 1}),
    ]


def test_answers_of_an_evaluation_are_filtered_by_verdict(api, database, owned):
    order = {"model": {"run": owned.run_id, "checkpoint": "last"}, "dataset": "d"}
    submit(database, "evaluate", order)
    evaluation = claim(database)
    store(database, evaluation, answers(0, 5), Result({"acc": {"value": 0.6}, "worst": None}))
    finish(database, evaluation, "succeeded")
    path = f"/evaluations/{evaluation.run_id}"
    assert api.get(path).json()["result"]["acc"] == {"value": 0.6}
    assert [row["sample"] for row in rows(api, f"{path}/items", verdict="right", limit=2)] == [0, 2, 4]
    assert [row["id"] for row in rows(api, f"/runs/{owned.run_id}/evaluations")] == [evaluation.run_id]
    assert rows(api, f"/runs/{evaluation.run_id}/evaluations") == []


def test_a_checkpoint_is_listed_without_its_place_and_downloaded_as_an_archive(api, owned):
    (row,) = rows(api, f"/runs/{owned.run_id}/checkpoints")
    assert (row["step"], row["files"]) == (
        200,
        [{"size": 1000, "sha256": "0" * 64, "name": "adapter_model.safetensors"}],
    )
    archive = api.get(row["links"]["archive"])
    assert (archive.status_code, archive.headers["content-type"]) == (200, "application/x-tar")
    with tarfile.open(fileobj=io.BytesIO(archive.content)) as files:
        assert files.extractfile("adapter_model.safetensors").read() == b"w" * 1000
    assert api.get(f"/runs/{owned.run_id}/checkpoints/7/archive").status_code == 404


def test_a_checkpoint_outside_the_artifacts_is_not_given_away(api, database, owned):
    store(database, owned, Checkpoint(201, "/etc", []))
    assert api.get(f"/runs/{owned.run_id}/checkpoints/201/archive").status_code == 404


def test_a_log_is_read_whole_and_in_ranges(api, database, owned):
    path = f"/jobs/{owned.job_id}/logs"
    assert api.get(path).content == b""
    for piece in (b"loading\n", "schöne Grüße\n".encode(), b"done\n"):
        call(database, append_log, owned.job_id, owned.attempt, piece, 10_000)
    whole = api.get(path).content
    size = len(whole)
    assert whole == "loading\nschöne Grüße\ndone\n".encode()
    for header, start, end in (("bytes=3-9", 3, 10), ("bytes=8-", 8, size), ("bytes=-5", size - 5, size)):
        part = api.get(path, headers={"Range": header})
        assert (part.status_code, part.content) == (206, whole[start:end])
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
    refusal = api.get(path, headers={"Range": f"bytes={size}-"})
    assert (refusal.status_code, refusal.json()["code"]) == (416, "range_not_satisfiable")


def undocumented(body, known) -> set[str]:
    """Names in an answer that its documented model does not have."""
    if isinstance(body, list) and isinstance(known, list):
        return {name for pair in zip(body, known, strict=True) for name in undocumented(*pair)}
    if not isinstance(body, dict) or not isinstance(known, dict):
        return set()
    inside = {name for key in body.keys() & known.keys() for name in undocumented(body[key], known[key])}
    return inside | (body.keys() - known.keys())


def test_every_answer_is_as_documented(api, database, owned, tmp_path):
    submit(database, "entropy")
    entropy = claim(database)
    store(database, entropy, trace(0, 0), Progress("score", 1, 1, {"rate": 2.0}))
    submit(database, "evaluate")
    evaluation = claim(database)
    finish(database, evaluation, "failed", reason="oom", error={"code": "oom", "message": "m", "log_tail": "l"})
    call(database, claims.register_worker, "worker-a", host="h", pid=1, queues=["default"])
    ids = {"/evaluations": evaluation, "/analyze/entropy": entropy}
    for kind in ("perturbation", "branch"):
        submit(database, kind)
        ids[f"/analyze/{kind}"] = claim(database)
        store(database, ids[f"/analyze/{kind}"], answers(0, 2), Result({"arms": {}}))
    checked = 0
    for route in create_app(Settings(data_dir=tmp_path / "routes")).routes:
        if not isinstance(route, APIRoute) or "GET" not in route.methods or not route.response_model:
            continue
        if route.path in ("/evaluations/compare", "/evaluations/report"):  # ids in the query: test_api_evaluations
            continue
        at = next((found for prefix, found in ids.items() if route.path.startswith(prefix)), owned)
        path = re.sub(r"\{(job|run)_id\}", lambda m, at=at: getattr(at, f"{m[1]}_id"), route.path).format(n=0, step=200)
        body = api.get(path).json()
        known = TypeAdapter(route.response_model).validate_python(body)
        assert not undocumented(body, TypeAdapter(route.response_model).dump_python(known, mode="json")), path
        checked += 1
    assert checked > 20
