"""An order that no running worker could carry out is refused at once; where none runs, it waits."""

import pytest
from db_rows import call

from erpo_core.specs import parse_spec
from service.db import claims
from workers.abilities import abilities

TRAIN = {"model": "smollm2-135m", "dataset": "reasoning-gym:chain_sum"}
EVALUATE = {"model": "smollm2-135m", "dataset": "reasoning-gym:chain_sum", "engine": "vllm"}
IN_4_BITS = TRAIN | {"load_in_4bit": True}
WITH_VLLM_ON_FOUR = EVALUATE | {"hardware": {"num_gpus": 4}}
ON_EIGHT = TRAIN | {"hardware": {"num_gpus": 8, "strategy": "ddp"}}
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
        ("train", IN_PARTS, [["cuda", "cuda:1", "deepspeed"], []], "/hardware/num_gpus", "2 CUDA devices"),
        ("train", ON_EIGHT, [["cuda", "cuda:4"], ["cuda", "cuda:1"]], "/hardware/num_gpus", "8 CUDA devices"),
        ("evaluate", WITH_VLLM_ON_FOUR, [["cuda", "cuda:2", "vllm"]], "/hardware/num_gpus", "4 CUDA devices"),
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


@pytest.mark.parametrize("workers", [[], [None], [[]], [["cuda"]], [["cuda", "cuda:1"], ["cuda", "cuda:8"]]])
def test_devices_are_no_matter_where_a_worker_may_have_as_many_or_has_none_at_all(api, database, workers):
    register(database, *workers)
    assert api.post("/jobs/train", json=ON_EIGHT).status_code == 202


def test_an_evaluation_with_vllm_spans_devices_without_a_strategy(api, database):
    register(database, ["cuda", "cuda:4", "vllm"])
    assert api.post("/jobs/evaluate", json=WITH_VLLM_ON_FOUR).status_code == 202
    assert parse_spec("evaluate", WITH_VLLM_ON_FOUR).hardware.num_gpus == 4


def test_a_plain_order_asks_for_nothing(api, database):
    register(database, [])
    assert api.post("/jobs/train", json=TRAIN).status_code == 202
    assert api.get("/workers").json()["data"][0]["abilities"] == []


@pytest.mark.parametrize(
    ("visible", "files", "found"),
    [
        (None, ["nvidiactl", "nvidia0", "nvidia1", "nvidia-uvm", "nvidia10"], ["cuda", "cuda:3"]),
        ("1,0", ["nvidiactl", "nvidia0", "nvidia1", "nvidia2"], ["cuda", "cuda:2"]),
        (None, ["dxg"], ["cuda"]),
        (None, [], []),
    ],
)
def test_devices_are_counted_by_the_drivers_files(monkeypatch, tmp_path, visible, files, found):
    monkeypatch.setattr("workers.abilities.Path", lambda path: tmp_path / path.removeprefix("/"))
    monkeypatch.setattr("workers.abilities.version", lambda package: "2.9.0")
    monkeypatch.setattr("workers.abilities._PACKAGES", ())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (tmp_path / "dev").mkdir()
    for name in files:
        (tmp_path / "dev" / name).touch()
    assert abilities() == found
    monkeypatch.setattr("workers.abilities.version", lambda package: "2.9.0+cpu")
    assert abilities() == []


def test_a_hidden_device_is_none(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "cuda" not in abilities()
    assert parse_spec("train", IN_4_BITS).load_in_4bit
