"""A training that starts from a run's adapter trains that adapter, and its specification says so."""

import pytest
from db_rows import claim, finish, run_of, store

from erpo_core.records import Checkpoint
from service.settings import Settings

TRAIN = {"model": "smollm2-135m", "dataset": "data:solved.jsonl"}
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(autouse=True)
def solved(api, tmp_path):
    row = '{"problem": "What is 1 + 1?", "answer": "2", "solution": "It is 2."}\n'
    (Settings(data_dir=tmp_path).data_root / "solved.jsonl").write_text(row * 3)


@pytest.fixture
def order(api):
    """Orders a training that starts from a run; the answer."""

    def post(parent, **changes):
        return api.post("/jobs/train", json=TRAIN | {"model": {"run": parent}} | changes)

    return post


@pytest.fixture
def parent(api, database):
    """Makes a training with the given ``lora`` that waits, or is finished; its run."""

    def make(lora, *, finished=True) -> str:
        job = api.post("/jobs/train", json=TRAIN | {"lora": lora}).json()
        if finished:
            owned = claim(database)
            assert owned.job_id == job["id"]
            store(database, owned, Checkpoint(2, "/x/2", [], {}))
            finish(database, owned, "succeeded")
        return job["run_id"]

    return make


@pytest.mark.parametrize("algorithm", ["erpo", "sft"])
@pytest.mark.parametrize("finished", [True, False])
def test_what_is_left_out_is_the_parents_along_a_chain_of_runs(database, order, parent, algorithm, finished):
    run = parent(LORA, finished=finished)
    for _ in range(2):
        job = order(run, algorithm=algorithm).json()
        run = job["run_id"]
        assert run_of(database, run).spec["lora"] == LORA
    assert order(run, lora=LORA).status_code == 202


@pytest.mark.parametrize("algorithm", ["erpo", "sft"])
@pytest.mark.parametrize("lora", [None, {"r": 16, "target_modules": ["q_proj"]}, {}])
def test_another_adapter_or_none_is_refused(api, order, parent, algorithm, lora):
    run = parent(LORA)
    response = order(run, algorithm=algorithm, lora=lora)
    (error,) = response.json()["errors"]
    assert (response.status_code, error["pointer"]) == (422, "/lora")
    assert "leave `lora` out" in error["mend"]
    assert '"r":4' in error["mend"]
    assert len(api.get("/jobs").json()["data"]) == 1


def test_a_dry_run_says_what_is_inherited(api, parent):
    body = TRAIN | {"model": {"run": parent(LORA)}}
    assert api.post("/jobs/train?dry_run=true", json=body).json()["spec"]["lora"] == LORA


def test_on_whole_weights_any_adapter_may_be_put(database, order, parent):
    run = parent(None)
    for lora in (None, LORA):
        assert run_of(database, order(run, lora=lora).json()["run_id"]).spec["lora"] == lora
    assert run_of(database, order(run).json()["run_id"]).spec["lora"]["r"] == 32


def test_an_adapter_that_imitation_trained_with_dropout_is_trained_further_without(database, api, order, parent):
    """Scores and loss of erpo and grpo are without dropout, whatever the adapter was trained with."""
    job = api.post("/jobs/train", json=TRAIN | {"algorithm": "sft", "lora": LORA | {"lora_dropout": 0.1}}).json()
    answer = order(job["run_id"], algorithm="erpo")
    assert answer.status_code == 202
    assert run_of(database, answer.json()["run_id"]).spec["lora"] == LORA
    assert order(job["run_id"], algorithm="erpo", lora=LORA).status_code == 202
    imitating = order(job["run_id"], algorithm="sft").json()
    assert run_of(database, imitating["run_id"]).spec["lora"] == LORA | {"lora_dropout": 0.1}


@pytest.mark.parametrize("modules", [[], "", ["q_proj", "lm_head"]])
def test_modules_that_no_adapter_can_be_put_on_are_refused(api, modules):
    answer = api.post("/jobs/train", json=TRAIN | {"lora": {"target_modules": modules}})
    assert answer.status_code == 422
    assert "target_modules" in answer.text
