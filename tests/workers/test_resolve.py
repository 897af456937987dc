"""What a child gets for the model, the checkpoint to resume from, and the answers that are already there."""

from pathlib import Path

import pytest

from erpo_core.errors import UnknownReferenceError
from erpo_core.job import JobInputs, ModelInput
from erpo_core.records import Checkpoint, Completions
from service.db import claims
from service.db.jobs import create_job
from service.db.records import apply_records
from workers.resolve import resolve_inputs, resolve_model


def train(session, settings, model="tiny", rewards=(0.1, 0.9, 0.4), **spec):
    """A claimed training with a checkpoint of a reward at steps 10, 20, ..."""
    create_job(session, kind="train", spec={"model": model, **spec}, options={})
    claim = claims.claim_next(session, queues=["default"], worker_id="w", lease_seconds=60)
    records = []
    for number, reward in enumerate(rewards, 1):
        folder = settings.artifacts_dir / claim.run_id / f"step-{number * 10}"
        folder.mkdir(parents=True)
        records.append(Checkpoint(number * 10, str(folder), [], {"reward": reward}))
    apply_records(session, job_id=claim.job_id, run_id=claim.run_id, attempt=1, records=records)
    return claim


def step_of(model: ModelInput) -> str:
    return model.adapter_path.name


def test_a_name_stays_a_name(database):
    with database.read() as session:
        assert resolve_model(session, "smollm2-135m") == ModelInput("smollm2-135m")


@pytest.mark.parametrize(("wanted", "step"), [("last", "step-30"), ("best", "step-20"), (10, "step-10")])
def test_a_run_gives_its_base_and_the_checkpoint_that_is_asked_for(database, settings, wanted, step):
    with database.write() as session:
        claim = train(session, settings)
        model = resolve_model(session, {"run": claim.run_id, "checkpoint": wanted})
    assert model.base == "tiny"
    assert step_of(model) == step


def test_a_run_that_started_from_a_run_has_the_first_ones_base(database, settings):
    with database.write() as session:
        first = train(session, settings)
        second = train(session, settings, model={"run": first.run_id, "checkpoint": "last"}, rewards=(0.5,))
        model = resolve_model(session, {"run": second.run_id})
    assert (model.base, step_of(model)) == ("tiny", "step-10")
    assert second.run_id in str(model.adapter_path)


def test_a_checkpoint_of_every_weight_is_a_base_and_no_adapter(database, settings):
    with database.write() as session:
        claim = train(session, settings, lora=None)
        model = resolve_model(session, {"run": claim.run_id, "checkpoint": "last"})
    assert Path(model.base).name == "step-30"
    assert model.adapter_path is None


def test_a_checkpoint_that_is_not_there_is_named(database, settings):
    with database.write() as session:
        claim = train(session, settings, rewards=(0.1,))
        with pytest.raises(UnknownReferenceError, match="99"):
            resolve_model(session, {"run": claim.run_id, "checkpoint": 99})
        next(settings.artifacts_dir.rglob("step-10")).rmdir()
        with pytest.raises(UnknownReferenceError, match="gone"):
            resolve_model(session, {"run": claim.run_id})


def test_training_resumes_from_its_newest_checkpoint_in_a_folder_of_its_own(database, settings):
    with database.write() as session:
        claim = train(session, settings)
        first = resolve_inputs(session, claim, settings)
        claims.finish_attempt(session, claim.job_id, 1, outcome="requeued")
        again = claims.claim_next(session, queues=["default"], worker_id="w", lease_seconds=60)
        inputs = resolve_inputs(session, again, settings)
    assert again.attempt == 2
    assert inputs.resume_from.name == "step-30"
    assert inputs.work_dir != first.work_dir
    assert inputs.work_dir.name == "attempt-2"
    assert JobInputs.from_json(inputs.to_json()) == inputs


def test_an_evaluation_is_told_which_answers_are_stored(database, settings):
    with database.write() as session:
        create_job(session, kind="evaluate", spec={"model": "tiny"}, options={})
        claim = claims.claim_next(session, queues=["default"], worker_id="w", lease_seconds=60)
        assert resolve_inputs(session, claim, settings).stored == frozenset()
        row = {"prompt_id": "p1", "sample": 3, "completion": "x", "group": 0, "prompt": "q"}
        records = [Completions(0, [row])]
        apply_records(session, job_id=claim.job_id, run_id=claim.run_id, attempt=1, records=records)
        claims.finish_attempt(session, claim.job_id, 1, outcome="requeued")
        again = claims.claim_next(session, queues=["default"], worker_id="w", lease_seconds=60)
        assert resolve_inputs(session, again, settings).stored == {("p1", 3)}
