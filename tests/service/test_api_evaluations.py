"""Evaluations over HTTP: recomputed, taken apart, compared, and as tables; what cannot be compared is refused."""

import json

import pytest
from db_rows import call, claim, finish, store, submit
from test_api_records import undocumented

from erpo_core.evaluation_identity import evaluation_identity
from erpo_core.evaluation_summary import summarise
from erpo_core.paired import mcnemar_exact, sign_flip_exact
from erpo_core.records import Completions, Progress, Resolved, Result
from erpo_core.specs.evaluate import EvaluateSpec
from service.db import keys
from service.schemas.evaluations import Comparison, Report

HTML = "<img src=x onerror=alert(1)>"


def evaluated(database, right, *, owner=None, model="base", dataset="data:sums.jsonl", n=4, ended=True, **more):
    """An evaluation whose problem i has ``right[i]`` right answers of ``n``, then one unboxed; its run id."""
    spec = EvaluateSpec.model_validate({"model": model, "dataset": dataset, "num_samples": n, **more})
    submit(database, "evaluate", spec=spec.model_dump(mode="json", exclude={"job"}), owner=owner)
    owned = claim(database)
    rows = [answer(group, sample, count) for group, count in enumerate(right) for sample in range(n)]
    resolved = {"model_digest": model, "dataset_digest": f"{dataset}:{len(right)}", "template_digest": "t"}
    identity = evaluation_identity(spec, resolved, "0.9.0+3")
    store(database, owned, Progress("load", 0, 1), Resolved(resolved | {"identity": identity}), Completions(0, rows))
    if ended:
        store(database, owned, Result(json.loads(json.dumps(summarise(rows, spec)))))
        finish(database, owned, "succeeded")
    return owned.run_id


def answer(group, sample, count):
    is_right = sample < count
    boxed = is_right or sample != count
    return {
        **{"prompt_id": f"p/{group}", "group": group, "sample": sample, "prompt": f"{HTML} {group}?"},
        **{"completion": "\\boxed{2}" if is_right else "\\boxed{3}" if boxed else HTML, "gold": "2"},
        **{"verdict": "right" if is_right else "wrong" if boxed else "unparsable", "boxed": boxed},
        **{"reward": float(is_right), "rewards": {"accuracy": float(is_right)}, "num_tokens": 10 + sample},
        **{"truncated": sample == 0, "level": str(group % 2 + 1), "subject": None, "advantage": None},
    }


def refused(response, mend):
    body = response.json()
    assert response.status_code == 422, body
    (error,) = body["errors"]
    assert error["pointer"].startswith("/query/")
    assert mend in error["mend"]
    return body["detail"]


def compared(api, *run_ids):
    return api.get("/evaluations/compare", params={"evaluation": run_ids})


def test_numbers_are_recomputed_from_stored_answers(api, database):
    run = evaluated(database, [4, 1, 0])
    stored = api.get(f"/evaluations/{run}").json()["result"]
    assert sorted(stored["pass_at"]) == ["1", "2", "4"]
    assert stored["acc"]["value"] == 5 / 12
    other = api.get(f"/evaluations/{run}", params={"pass_at": "1, 3"}).json()["result"]
    assert sorted(other["pass_at"]) == ["1", "3"]
    assert other["pass_at"]["3"]["value"] == pytest.approx((1 + 0.75 + 0) / 3)
    assert other["acc"] == stored["acc"]
    strict = api.get(f"/evaluations/{run}", params={"truncated_boxed": "wrong"}).json()["result"]
    assert strict["acc"]["value"] == 3 / 12
    assert api.get(f"/evaluations/{run}").json()["result"] == stored


def test_stored_answers_are_judged_again_by_a_job(api, database):
    run = evaluated(database, [4, 1, 0])
    job = api.post(f"/evaluations/{run}/verify")
    assert (job.status_code, job.json()["kind"]) == (202, "evaluate")
    again = api.get(f"/evaluations/{job.json()['run_id']}").json()
    assert again["spec"] == api.get(f"/evaluations/{run}").json()["spec"] | {"answers_of": run}
    owned = claim(database)
    store(database, owned, Progress("verify", 0, 12), Completions(0, [answer(0, 0, 0)]))
    finish(database, owned, "succeeded")
    assert api.post(f"/evaluations/{owned.run_id}/verify").status_code == 202, "one that was judged again, too"
    assert api.get(f"/evaluations/{run}").json()["result"]["acc"]["value"] == 5 / 12


def test_answers_that_are_not_there_are_not_judged(api, database, job_in):
    running, empty = evaluated(database, [4], ended=False), job_in("failed", "evaluate").run_id
    training = job_in("succeeded").run_id
    for path, status, said in (
        (f"/evaluations/{running}/verify", 422, "wait until its job has ended"),
        (f"/evaluations/{training}/verify", 404, "kind train"),
        (f"/evaluations/run_{'0' * 32}/verify", 404, "there is no run"),
    ):
        response = api.post(path)
        assert (response.status_code, said in response.text) == (status, True)
    run = evaluated(database, [4, 1])
    body = api.get(f"/evaluations/{run}").json()["spec"] | {"answers_of": run}
    assert api.post("/jobs/evaluate", json=body, params={"dry_run": True}).json()["estimate"]["completions"] == 0
    for change, pointer, said in (
        ({"answers_of": empty}, "/answers_of", "has answers"),
        ({"answers_of": "run_" + "0" * 32}, "/answers_of", "GET /runs"),
        ({"dataset": "amc23"}, "/dataset", f"POST /evaluations/{run}/verify"),
        ({"num_samples": 3, "pass_at": [1]}, "/num_samples", f"POST /evaluations/{run}/verify"),
    ):
        (error,) = api.post("/jobs/evaluate", json=body | change).json()["errors"]
        assert (error["pointer"], said in error["mend"]) == (pointer, True)
    assert api.get("/jobs", params={"status": "queued"}).json()["data"] == []


def test_levels_have_numbers_of_their_own(api, database):
    by = api.get(f"/evaluations/{evaluated(database, [4, 1, 0])}").json()["result"]["by"]
    assert sorted(by) == ["level"]
    assert {level: (row["num_problems"], row["acc"]["value"]) for level, row in by["level"].items()} == {
        **{"1": (2, 0.5), "2": (1, 0.25)}
    }


def test_a_running_evaluation_has_numbers_already(api, database):
    run = evaluated(database, [4, 1], ended=False)
    assert api.get(f"/evaluations/{run}").json()["result"] is None
    assert api.get(f"/evaluations/{run}", params={"pass_at": "1"}).json()["result"]["acc"]["value"] == 5 / 8


def test_a_k_beyond_the_samples_is_refused(api, database):
    run = evaluated(database, [1])
    for ks in ("5", "0", "-1", "x", "1,,2", "", "1.5", "9" * 30):
        assert "from 1 to 4" in refused(api.get(f"/evaluations/{run}", params={"pass_at": ks}), "pass_at=1,4")


def test_every_number_comes_apart_down_to_one_answer(api, database):
    run = evaluated(database, [4, 1, 0], truncated_boxed="wrong")
    first = api.get(f"/evaluations/{run}/problems", params={"limit": 2}).json()
    rest = api.get(f"/evaluations/{run}/problems", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    rows = [*first["data"], *rest["data"]]
    assert (rest["has_more"], [row["prompt_id"] for row in rows]) == (False, ["p/0", "p/1", "p/2"])
    assert [(row["num_right"], row["num_boxed"], row["num_truncated"]) for row in rows] == [
        *((3, 4, 1), (0, 3, 1), (0, 3, 1))
    ]
    assert (rows[1]["level"], rows[1]["gold"], rows[1]["mean_length"]) == ("2", "2", 11.5)
    assert rows[0]["prompt"] == f"{HTML} 0?"
    answers = api.get(f"/evaluations/{run}/items", params={"prompt_id": "p/1"}).json()["data"]
    assert [(row["sample"], row["verdict"], row["level"]) for row in answers] == [
        *((0, "right", "2"), (1, "unparsable", "2"), (2, "wrong", "2"), (3, "wrong", "2"))
    ]


def test_models_are_compared_by_problem(api, database):
    base = evaluated(database, [0, 1, 2, 4, 0, 0])
    better = evaluated(database, [4, 4, 3, 4, 2, 1], model="trained", sampling={"seed": 9})
    worse = evaluated(database, [0, 0, 2, 0, 0, 0], model="broken")
    body = compared(api, base, better, worse).json()
    assert not undocumented(body, Comparison.model_validate(body).model_dump(mode="json"))
    assert (body["num_tests"], body["correction"]) == (2, "holm")
    (found,) = body["benchmarks"]
    assert (found["baseline"], found["num_problems"], found["num_samples"]) == (base, 6, 4)
    assert [row["model"] for row in found["evaluations"]] == ["base", "trained", "broken"]
    first, second = found["comparisons"]
    gains = [4, 3, 1, 0, 2, 1]
    assert first["acc"]["value"] == pytest.approx(sum(gains) / 24)
    assert first["acc"]["low"] <= first["acc"]["value"] <= first["acc"]["high"]
    assert first["problems"] == {"better": 5, "worse": 0, "equal": 1}
    assert (first["test"], first["p_value"]) == ("sign_flip_exact", pytest.approx(sign_flip_exact(gains)))
    assert first["p_adjusted"] == pytest.approx(min(1, 2 * first["p_value"]))
    assert sorted(first["pass_at"]) == ["1", "2", "4"]
    assert first["pass_at"]["4"]["value"] == pytest.approx(6 / 6 - 3 / 6)
    assert second["problems"] == {"better": 0, "worse": 2, "equal": 4}


def test_single_samples_are_compared_by_mcnemar_over_benchmarks(api, database):
    runs = [
        evaluated(database, right, model=model, dataset=dataset, n=1)
        for dataset, first, second in (("data:a.jsonl", [0] * 8, [1] * 7 + [0]), ("data:b.jsonl", [1, 0, 1], [0, 1, 1]))
        for model, right in (("base", first), ("trained", second))
    ]
    body = compared(api, *runs).json()
    tests = [row for benchmark in body["benchmarks"] for row in benchmark["comparisons"]]
    assert [(row["test"], row["p_value"]) for row in tests] == [
        ("mcnemar_exact", pytest.approx(mcnemar_exact(0, 7))),
        ("mcnemar_exact", 1.0),
    ]
    assert tests[0]["p_adjusted"] == pytest.approx(2 * tests[0]["p_value"])


def test_what_differs_in_more_than_the_model_is_not_compared(api, database):
    base = evaluated(database, [1, 2])
    for change, name in (
        ({"dataset": "data:others.jsonl"}, "dataset"),
        ({"sampling": {"temperature": 0.6}}, "temperature"),
        ({"n": 2}, "num_samples"),
        ({"truncated_boxed": "wrong"}, "truncated_boxed"),
        ({"prompt": {"system_prompt": "Be brief."}}, "system_prompt"),
        ({"prompt": {"template": "qwen-boxed"}}, "template"),
        ({"prompt": {"worked_examples": [{"problem": "1 + 1?", "solution": "2"}]}}, "worked_examples"),
    ):
        other = evaluated(database, [1, 1], model="trained", **change)
        assert f"differ in {name}" in refused(compared(api, base, other), "only the model")


def test_only_finished_evaluations_of_the_caller_are_compared(api, database, job_in):
    base = evaluated(database, [1])
    running = evaluated(database, [1], ended=False)
    training = job_in("succeeded").run_id
    assert "has no result: it is running" in refused(compared(api, base, running), "wait")
    assert "kind train" in refused(compared(api, base, training), "GET /runs?kind=evaluate")
    assert "there is no run" in refused(compared(api, base, "run_" + "0" * 32), "GET /runs?kind=evaluate")
    assert "twice" in refused(compared(api, base, base), "once")
    refused(compared(api, base), "at least 2 items")
    alone = evaluated(database, [1], dataset="data:b.jsonl")
    trained = evaluated(database, [1], model="trained")
    assert "only one on data:b.jsonl" in refused(compared(api, base, trained, alone), "two evaluations")


def test_evaluations_of_others_do_not_exist(api, database):
    secret = call(database, keys.create_key, scope="read", owner="ann")[1]
    mine, alien = evaluated(database, [1], owner="ann"), evaluated(database, [1], owner="bob", model="trained")
    api.headers["Authorization"] = f"Bearer {secret}"
    assert f"there is no run {alien}" in refused(compared(api, mine, alien), "GET /runs?kind=evaluate")
    assert f"there is no run {alien}" in refused(report(api, alien), "GET /runs?kind=evaluate")
    assert api.get(f"/evaluations/{alien}/problems").status_code == 404
    assert report(api, mine).status_code == 200


def report(api, *run_ids, accept="*/*", **query):
    return api.get("/evaluations/report", params={"evaluation": run_ids, **query}, headers={"Accept": accept})


def test_the_report_is_a_row_of_table_1_in_four_formats(api, database):
    run = evaluated(database, [4, 1], dataset="amc23", model="org/tiny_1")
    body = report(api, run, paper=True).json()
    assert not undocumented(body, Report.model_validate(body).model_dump(mode="json"))
    assert body["columns"] == ["amc23_acc", "amc23_fmt"]
    ours, *paper = body["rows"]
    assert (ours["label"], ours["source"], ours["evaluations"]) == ("org/tiny_1", "run", {"amc23": run})
    assert ours["cells"]["amc23_acc"]["value"] == 62.5
    assert len(paper) == 14
    assert any("cut at the length limit: amc23 25.0%" in note for note in body["notes"])
    assert any("arXiv 2603.28204" in note for note in body["notes"])
    csv = report(api, run, format="csv")
    assert csv.headers["content-type"] == "text/csv; charset=utf-8"
    assert csv.text == "model,amc23_acc,amc23_fmt\norg/tiny_1,62.50,87.50\n"
    assert report(api, run, accept="text/csv").text == csv.text
    assert report(api, run, accept="text/csv", format="json").json()["table"] == "accuracy"
    assert "| org/tiny_1 | 62.50 [25.0, 100.0] |" in report(api, run, format="markdown").text
    assert r"org/tiny\_1 & 62.50" in report(api, run, accept="application/x-latex").text
    table_2 = report(api, run, table="pass_at", format="csv").text
    assert table_2 == "model,amc23_pass@2,amc23_pass@4\norg/tiny_1,75.00,100.00\n"


def test_a_report_says_where_rows_were_not_measured_alike(api, database):
    first = evaluated(database, [4, 1], dataset="amc23")
    other = evaluated(database, [4, 1], dataset="aime24", sampling={"temperature": 0.6})
    notes = report(api, first, other).json()["notes"]
    assert f"{other} differs from {first} in temperature" in notes
    again = evaluated(database, [4, 2], dataset="amc23")
    assert f"{first} and {again}" in refused(report(api, first, again), "one of them")
    assert "'latex'" in refused(report(api, first, format="pdf"), "").replace('"', "'") or True


def test_benchmarks_are_listed_with_licence_and_presence(serve, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "aime24.jsonl").write_text('{"problem": "p", "answer": "1"}\n')
    listed = {row["name"]: row for row in serve(data_root=root).get("/benchmarks").json()["data"]}
    assert (listed["aime24"]["is_present"], listed["amc23"]["is_present"]) == (True, False)
    assert (listed["gsm8k"]["num_problems"], listed["gsm8k"]["license"]) == (1319, "MIT")


def test_a_wrong_benchmark_is_refused_before_queueing(serve, tmp_path):
    pytest.importorskip("math_verify")
    client = serve(data_root=tmp_path)
    (tmp_path / "unreadable.jsonl").write_text('{"problem": "p", "answer": "\\\\frac{}{}"}\n')
    (tmp_path / "broken.jsonl").write_text('{"problem": "p", "answer": "1"}\n{"problem": "p", \n')
    for change, pointer, mend in (
        ({"dataset": "amc24"}, "/dataset", "amc23"),
        ({"dataset": "amc23"}, "/dataset", "erpo data fetch amc23"),
        ({"dataset": "math500?split=x"}, "/dataset", "level, subject"),
        ({"dataset": "data:unreadable.jsonl"}, "/dataset", "LaTeX"),
        ({"dataset": "data:broken.jsonl"}, "/dataset", "JSON object"),
        ({"num_samples": 2, "pass_at": [1, 4]}, "/pass_at", "num_samples of at least 4"),
        ({"pass_at": [0]}, "/pass_at/0", "at least 1"),
    ):
        response = client.post(
            "/jobs/evaluate", json={"model": "smollm2-135m", "dataset": "reasoning-gym:chain_sum", **change}
        )
        assert response.status_code == 422, response.text
        errors = {error["pointer"]: error["mend"] for error in response.json()["errors"]}
        assert mend in errors[pointer]
    assert client.get("/jobs").json()["data"] == []


def test_few_samples_need_no_pass_at(api):
    body = {"model": "smollm2-135m", "dataset": "reasoning-gym:chain_sum", "num_samples": 3}
    job = api.post("/jobs/evaluate", json=body)
    assert job.status_code == 202
    assert api.get(f"/runs/{job.json()['run_id']}").json()["spec"]["pass_at"] == [1, 2]
