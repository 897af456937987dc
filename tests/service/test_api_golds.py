"""Golds are read before a job is queued where they count, and hold no request for long."""

import json
import time

import pytest

from service import admission
from service.settings import Settings

pytest.importorskip("math_verify")

SLOW = ["(" * 330 + f"x{number}" + ")" * 330 for number in range(16)]
ORDER = {"model": "smollm2-135m", "generation_batch_size": 8}


@pytest.fixture
def files(api, database, tmp_path):
    """Data sets in the data root by the golds that they hold."""
    root = Settings(data_dir=tmp_path, database_url=database.url).data_root

    def write(name: str, *golds: str) -> str:
        rows = [{"problem": "p", "solution": "s", "answer": gold} for gold in golds]
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return f"data:{name}.jsonl"

    return write


def test_golds_that_take_long_are_left_to_the_worker(api, files, monkeypatch):
    monkeypatch.setattr(admission, "SECONDS_BEFORE_QUEUEING", 1)
    benchmarks = [files("slow2", *SLOW), files("slow3", *SLOW)]
    body = ORDER | {"dataset": files("slow", *SLOW), "eval_every": 1, "eval_benchmarks": benchmarks}
    started = time.monotonic()
    assert api.post("/jobs/train", json=body).status_code == 202
    assert time.monotonic() - started < 20


def test_golds_count_where_answers_are_judged(api, files):
    body = ORDER | {"dataset": files("empty", r"\hbox{}")}
    refused = api.post("/jobs/train", json=body)
    assert (refused.status_code, refused.json()["errors"][0]["code"]) == (422, "unreadable_gold")
    by_form = body | {"rewards": [{"name": "boxed_format"}]}
    assert api.post("/jobs/train", json=by_form).status_code == 202
    imitating = {"model": "smollm2-135m", "dataset": body["dataset"], "algorithm": "sft"}
    assert api.post("/jobs/train", json=imitating).status_code == 202
    long = ORDER | {"dataset": files("long", "1" * 2001)}
    assert "2001 characters" in api.post("/jobs/train", json=long).json()["errors"][0]["message"]
