"""An order that no running worker could carry out is refused at once; where none runs, it waits."""

import pytest
from db_rows import call

from erpo_core.specs import parse_spec
from service.db import claims
from workers.abilities import abilities

TRAIN = {"model": "smollm2-135m", "dataset": "reasoning-gym:chain_sum"}
EVALUATE = {"model": "smollm2-135m", "dataset": "reasoning-gym:chain_sum", "engine": "vllm"}
IN_4_BITS = TRAIN | {"load_in_4bit": True}
IN_PARTS = TRAIN | {"hardware": {"num_gpus": 2, "strategy": "zero2"}}


def register(database, *found) -> None:
    for number, have in enumerate(found):
        call(database, claims.register_worker, f"w{number}", host="h", pid=1, queues=["default"], abilities=have)


@pytest.mark.parametrize(
    ("path", "body", "workers", "pointer", "missing"),
    [
        ("train", IN_4_BITS, [[]], "/load_in_4bit", "a CUDA device"),
        ("train", IN_4_BITS, [["vllm"], ["cuda"]], "/load_in_4bit", "bitsandbytes"),
        ("train", TRAIN | {"use_vllm": True}, [["cuda"]], "/use_vllm", "vLLM"),
        ("evaluate", EVALUATE, [[], ["cuda"]], "/engine", "vLLM"),
        ("train", IN_PARTS, [["cuda", "vllm"]], "/hardware/strategy", "`deepspeed`"),
    ],
)
def test_what_no_running_worker_has_is_refused_by_its_field(api, database, path, body, workers, pointer, missing):
    register(database, *workers)
    for query in ("", "?dry_run=true"):
        answer = api.post(f"/jobs/{path}{query}", json=body)
        (error,) = answer.json()["errors"]
        assert (answer.status_code, error["pointer"]) == (422, pointer)
        assert missing in error["message"]
        assert "start a worker" in error["mend"]
    assert api.get("/jobs").json()["data"] == []


@pytest.mark.parametrize("workers", [[], [None], [[], ["cuda", "bitsandbytes"]]])
def test_an_order_is_taken_where_a_worker_may_have_what_it_needs(api, database, workers):
    register(database, *workers)
    assert api.post("/jobs/train", json=IN_4_BITS).status_code == 202


def test_a_plain_order_asks_for_nothing(api, database):
    register(database, [])
    assert api.post("/jobs/train", json=TRAIN).status_code == 202
    assert api.get("/workers").json()["data"][0]["abilities"] == []


def test_a_hidden_device_is_none(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "cuda" not in abilities()
    assert parse_spec("train", IN_4_BITS).load_in_4bit
