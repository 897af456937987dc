"""What a child gets for the model, the checkpoint to resume from, and the answers that are already there."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sqlalchemy import delete

from erpo_core.checkpoints import publish
from erpo_core.codec import encode_trace
from erpo_core.errors import RunError, UnknownReferenceError
from erpo_core.job import JobInputs, ModelInput
from erpo_core.models import adapter_digest
from erpo_core.records import Checkpoint, Completions, Resolved, Trace
from erpo_core.resolved import report_resolved
from service.db import claims, jobs, runs, traces
from service.db.jobs import create_job
from service.db.measured import Checkpoint as CheckpointRow
from service.db.records import apply_records
from workers.resolve import (
    checkpoint_folders,
    damaged_checkpoints,
    resolve_inputs,
    resolve_model,
    surplus_checkpoints,
)


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


def damaged(session, claim) -> list[int]:
    return damaged_checkpoints(checkpoint_folders(session, claim))


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


@pytest.mark.parametrize("nested", [False, True])
def test_a_model_from_a_hub_stays_at_the_commit_that_was_fetched_first(database, settings, nested):
    """By a later attempt, and under the adapters that were trained on it."""
    fetched = {"base": "org/name@" + "a" * 40}
    with database.write() as session:
        claim = train(session, settings, model="org/name")
        assert resolve_inputs(session, claim, settings).model == ModelInput("org/name")
        found = Resolved({"model": fetched} if nested else fetched)
        apply_records(session, job_id=claim.job_id, run_id=claim.run_id, attempt=1, records=[found])
        later = resolve_inputs(session, claim, settings)
        assert (later.model, later.resolved) == (ModelInput(fetched["base"]), found.data)
        assert JobInputs.from_json(later.to_json()) == later
        trained = resolve_model(session, {"run": claim.run_id})
        second = train(session, settings, model={"run": claim.run_id})
        of_both = resolve_model(session, {"run": second.run_id})
    assert (trained.base, of_both.base) == (fetched["base"], fetched["base"])
    assert step_of(trained) == "step-30"


def test_a_checkpoint_of_every_weight_is_a_base_and_no_adapter(database, settings):
    with database.write() as session:
        claim = train(session, settings, lora=None)
        model = resolve_model(session, {"run": claim.run_id, "checkpoint": "last"})
    assert Path(model.base).name == "step-30"
    assert model.adapter_path is None


def saved(session, claim, settings, *steps):
    """Checkpoints of one more attempt, which is under way."""
    folders = [settings.artifacts_dir / claim.run_id / f"attempt-{claim.attempt}" / f"step-{step}" for step in steps]
    for folder in folders:
        folder.mkdir(parents=True)
    records = [Checkpoint(step, str(folder), []) for step, folder in zip(steps, folders, strict=True)]
    apply_records(session, job_id=claim.job_id, run_id=claim.run_id, attempt=claim.attempt, records=records)


def again(session, claim):
    """The next attempt of a job whose attempt has failed."""
    claims.finish_attempt(session, claim.job_id, claim.attempt, outcome="failed")
    jobs.retry_job(session, claim.job_id)
    return claims.claim_next(session, queues=["default"], worker_id="w", lease_seconds=60)


def on_every_weight(session, settings, **spec):
    """A training of every weight, and one that has begun from its last checkpoint and has saved one itself."""
    whole = train(session, settings, lora=None, **spec)
    begun = train(session, settings, model={"run": whole.run_id, "checkpoint": "last"}, rewards=(0.5,))
    base = resolve_inputs(session, begun, settings).model.base
    found = [Resolved({"model": {"base": base}})]
    apply_records(session, job_id=begun.job_id, run_id=begun.run_id, attempt=1, records=found)
    return whole, begun, base


def test_what_was_trained_on_every_weight_of_a_run_stays_on_the_checkpoint_that_it_began_from(database, settings):
    with database.write() as session:
        whole, begun, base = on_every_weight(session, settings)
        saved(session, again(session, whole), settings, 40)
        assert Path(resolve_model(session, {"run": whole.run_id}).base).name == "step-40"
        trained = resolve_model(session, {"run": begun.run_id})
        on_top = train(session, settings, model={"run": begun.run_id, "checkpoint": "last"}, rewards=(0.5,))
        assert (Path(base).name, trained.base) == ("step-30", base)
        assert resolve_model(session, {"run": on_top.run_id}).base == base
        assert resolve_inputs(session, again(session, begun), settings).model == ModelInput(base)
        Path(base).rmdir()
        for run in (begun, on_top):
            with pytest.raises(UnknownReferenceError, match="step-30") as caught:
                resolve_model(session, {"run": run.run_id})
            assert caught.value.code == "checkpoint_missing"


def test_an_evaluation_of_every_weight_goes_on_with_the_checkpoint_that_it_began_with(database, settings):
    with database.write() as session:
        whole = train(session, settings, lora=None)
        claim = claimed(session, "evaluate", {"model": {"run": whole.run_id, "checkpoint": "last"}})
        first = resolve_inputs(session, claim, settings).model
        found = [Resolved({"base": first.base})]
        apply_records(session, job_id=claim.job_id, run_id=claim.run_id, attempt=1, records=found)
        saved(session, again(session, whole), settings, 40)
        assert resolve_inputs(session, again(session, claim), settings).model == first


def test_a_checkpoint_that_another_training_lies_on_makes_no_room(database, settings):
    with database.write() as session:
        whole, _, base = on_every_weight(session, settings, save_total_limit=1)
        later = again(session, whole)
        saved(session, later, settings, 40, 50)
        # 20 is the best, 30 the base, 50 the last.
        assert list(surplus_checkpoints(session, later)) == [10, 40]
        assert Path(base).name == "step-30"


def test_a_later_attempt_never_goes_on_from_another_adapter_than_the_first(database, settings):
    """The run that it names has another last checkpoint by then: the attempt is refused, as where a file is another."""
    with database.write() as session:
        first = train(session, settings)
        second = train(session, settings, model={"run": first.run_id, "checkpoint": "last"}, rewards=(0.5,))
        began = resolve_inputs(session, second, settings).model
        (began.adapter_path / "adapter_model.safetensors").write_bytes(b"began with")
        found = Resolved({"model": {"base": "tiny", "adapter_digest": adapter_digest(began.adapter_path)}})
        apply_records(session, job_id=second.job_id, run_id=second.run_id, attempt=1, records=[found])
        saved(session, again(session, first), settings, 40)
        inputs = resolve_inputs(session, again(session, second), settings)
    (inputs.model.adapter_path / "adapter_model.safetensors").write_bytes(b"went on")
    now = {"model": {"base": "tiny", "adapter_digest": adapter_digest(inputs.model.adapter_path)}}
    sent = []
    with pytest.raises(RunError) as caught:
        report_resolved(SimpleNamespace(emit=sent.append), inputs, now)
    assert (caught.value.code, sent) == ("inputs_changed", [])


def test_of_the_runs_under_an_adapter_only_the_base_is_needed(database, settings):
    """The job may be deleted, and its checkpoint may have made room."""
    with database.write() as session:
        first = train(session, settings)
        second = train(session, settings, model={"run": first.run_id, "checkpoint": 10}, rewards=(0.5,))
        claims.finish_attempt(session, first.job_id, 1, outcome="succeeded")
        session.execute(delete(CheckpointRow).where(CheckpointRow.run_id == first.run_id))
        jobs.delete_job(session, first.job_id)
        model = resolve_model(session, {"run": second.run_id})
    assert (model.base, step_of(model)) == ("tiny", "step-10")
    assert second.run_id in str(model.adapter_path)


def test_a_job_that_was_taken_runs_though_what_it_names_is_deleted_since(database, settings):
    with database.write() as session:
        first = train(session, settings, prompt={"template": "raw"})
        rows = [{"prompt_id": "p", "sample": 0, "prompt": "1?", "completion": "2", "gold": "1"}]
        apply_records(session, job_id=first.job_id, run_id=first.run_id, attempt=1, records=[Completions(10, rows)])
        claims.finish_attempt(session, first.job_id, 1, outcome="succeeded")
        second = train(session, settings, model={"run": first.run_id, "checkpoint": 20}, rewards=())
        source = {"run": first.run_id, "step": None, "limit": 1}
        third = claimed(session, "entropy", {"source": source})
        jobs.delete_job(session, first.job_id)
        inputs = resolve_inputs(session, second, settings)
        assert (inputs.model.base, step_of(inputs.model)) == ("tiny", "step-20")
        assert resolve_inputs(session, third, settings).source["prompt_spec"] == {"template": "raw"}


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


def test_a_training_goes_back_behind_a_damaged_checkpoint(database, settings):
    with database.write() as session:
        claim = train(session, settings)
        folders = {row.step: Path(row.path) for row in runs.list_checkpoints(session, claim.run_id)}
        for step in (10, 20):
            (folders[step].parent / "new").mkdir()
            publish(folders[step].parent / "new", folders[step], step)
        assert damaged(session, claim) == [30], "it has no manifest"
        claims.drop_checkpoint(session, claim.job_id, 1, 30)
        assert damaged(session, claim) == []
        assert resolve_inputs(session, claim, settings).resume_from == folders[20]
        (folders[20] / "manifest.json").write_text('{"files": [{"name": "gone", "sha256": ""}]}')
        assert damaged(session, claim)[0] == 20


def test_a_checkpoint_that_a_killed_attempt_had_removed_is_forgotten(database, settings):
    with database.write() as session:
        claim = train(session, settings)
        folders = {row.step: Path(row.path) for row in runs.list_checkpoints(session, claim.run_id)}
        (folders[30].parent / "new").mkdir()
        publish(folders[30].parent / "new", folders[30], 30)
        assert damaged(session, claim) == []
        folders[10].rmdir()
        assert damaged(session, claim) == [10]
        claims.drop_checkpoint(session, claim.job_id, 1, 10)
        assert damaged(session, claim) == []
        assert [row.step for row in runs.list_checkpoints(session, claim.run_id)] == [20, 30]


def test_where_a_disk_is_missing_no_checkpoint_is_forgotten(database, settings):
    with database.write() as session:
        claim = train(session, settings)
        newest = runs.find_checkpoint(session, claim.run_id, "last")
        Path(newest.path).parent.rename(settings.artifacts_dir / "elsewhere")
        assert damaged(session, claim) == []
        with pytest.raises(UnknownReferenceError, match="gone") as caught:
            resolve_inputs(session, claim, settings)
        assert caught.value.code == "checkpoint_missing"
        assert len(runs.list_checkpoints(session, claim.run_id)) == 3


@pytest.mark.parametrize("name", ["step-30/manifest.json", "step-30", ""], ids=["a file", "the folder", "the disk"])
def test_where_a_checkpoint_cannot_be_read_none_is_forgotten(database, settings, name):
    with database.write() as session:
        claim = train(session, settings)
        parent = Path(runs.find_checkpoint(session, claim.run_id, "last").path).parent
        (parent / "step-30" / "manifest.json").write_text('{"files": []}')
        assert damaged(session, claim) == []
        place = parent / name
        place.rename(settings.artifacts_dir / "elsewhere")
        place.symlink_to(place)  # no user can follow it
        with pytest.raises(UnknownReferenceError, match="cannot be read") as caught:
            damaged(session, claim)
        assert caught.value.code == "checkpoint_missing"
        place.unlink()
        (settings.artifacts_dir / "elsewhere").rename(place)
        assert damaged(session, claim) == []


def test_an_older_checkpoint_that_cannot_be_read_keeps_nobody_from_the_newest(database, settings):
    with database.write() as session:
        claim = train(session, settings)
        folders = checkpoint_folders(session, claim)
        (folders[30] / "manifest.json").write_text('{"files": []}')
        folders[10].rmdir()
        folders[10].symlink_to(folders[10])
        assert damaged(session, claim) == []
        assert resolve_inputs(session, claim, settings).resume_from == folders[30]
        with pytest.raises(UnknownReferenceError, match="cannot be read"):
            resolve_model(session, {"run": claim.run_id, "checkpoint": 10})


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


def claimed(session, kind: str, spec: dict):
    create_job(session, kind=kind, spec={"model": "tiny", **spec}, options={})
    return claims.claim_next(session, queues=["default"], worker_id="w", lease_seconds=60)


@pytest.mark.parametrize("kind", ["perturbation", "branch"])
def test_an_analysis_that_samples_keeps_its_outcomes_too(database, settings, kind):
    with database.write() as session:
        trained = train(session, settings)
        sequence = traced(session, trained)
        claim = claimed(session, kind, {"sequence": sequence})
        row = {"prompt_id": "0/high/3/5>6", "sample": 1, "completion": "x", "verdict": "right"}
        apply_records(session, job_id=claim.job_id, run_id=claim.run_id, attempt=1, records=[Completions(0, [row])])
        claims.finish_attempt(session, claim.job_id, 1, outcome="requeued")
        again = claims.claim_next(session, queues=["default"], worker_id="w", lease_seconds=60)
        assert resolve_inputs(session, again, settings).stored == {("0/high/3/5>6", 1)}


def traced(session, claim) -> str:
    """The id of a stored sequence of a training, whose right answer stands with the answer it is the trace of."""
    name = {"prompt_id": "p1", "sample": 0}
    meta = name | {"prompt": "1 + 1?", "num_tokens": 3, "tokenizer_digest": "t", "pivots": []}
    columns = {"token_ids": np.array([7, 8, 9]), "entropy": np.zeros(3)}
    records = [Completions(30, [name | {"completion": "2", "gold": "2"}]), Trace(30, meta, encode_trace(columns))]
    apply_records(session, job_id=claim.job_id, run_id=claim.run_id, attempt=1, records=records)
    return traces.get_sequence(session, claim.run_id, 0).id


def test_a_branch_is_given_the_tokens_the_prompt_and_the_right_answer(database, settings):
    with database.write() as session:
        sequence = traced(session, train(session, settings, prompt={"template": "raw"}))
        inputs = resolve_inputs(session, claimed(session, "branch", {"sequence": sequence}), settings)
    assert inputs.source == {
        **{"prompt": "1 + 1?", "prompt_spec": {"template": "raw"}, "token_ids": [7, 8, 9]},
        **{"gold": "2", "tokenizer_digest": "t"},
    }
    assert JobInputs.from_json(inputs.to_json()) == inputs


def test_an_analysis_of_stored_answers_is_given_them_under_their_own_prompt(database, settings):
    with database.write() as session:
        trained = train(session, settings, prompt={"template": "raw"})
        rows = [
            {"prompt_id": f"p{i}", "sample": 0, "prompt": "1?", "completion": f"{i}", "gold": "1"} for i in range(4)
        ]
        records = [Completions(10, rows[:3]), Completions(20, rows[3:])]
        apply_records(session, job_id=trained.job_id, run_id=trained.run_id, attempt=1, records=records)
        source = {"run": trained.run_id, "step": 10, "limit": 2}
        first = claimed(session, "entropy", {"source": source, "prompt": {"template": "chat"}})
        inputs = resolve_inputs(session, first, settings)
        assert inputs.source["prompt_spec"] == {"template": "raw"}
        assert [row["completion"] for row in inputs.source["answers"]] == ["0", "1"]
        with pytest.raises(UnknownReferenceError, match="no answers"):
            resolve_inputs(session, claimed(session, "entropy", {"source": source | {"step": 15}}), settings)
        again = traced(session, first)
        branch = resolve_inputs(session, claimed(session, "branch", {"sequence": again}), settings)
    assert branch.source["prompt_spec"] == {"template": "raw"}


def test_each_run_of_an_evaluation_of_several_checkpoints_gets_its_own_adapter_and_answers(database, settings):
    with database.write() as session:
        trained = train(session, settings)
        specs = [{"model": {"run": trained.run_id, "checkpoint": wanted}} for wanted in (10, "best", "last")]
        job = create_job(session, kind="evaluate", spec=specs[0], options={}, more=specs[1:])
        claim = claims.claim_next(session, queues=["default"], worker_id="w", lease_seconds=60)
        row = {"prompt_id": "p1", "sample": 0, "completion": "x", "group": 0, "prompt": "q"}
        records = [Completions(0, [row], run_id) for run_id in job.run_ids[:2]]
        apply_records(session, job_id=claim.job_id, run_id=claim.run_id, attempt=1, records=[*records, records[0]])
        claims.finish_attempt(session, claim.job_id, 1, outcome="requeued")
        again = claims.claim_next(session, queues=["default"], worker_id="w", lease_seconds=60)
        inputs = resolve_inputs(session, again, settings)
    found = [inputs, *inputs.also]
    assert [one.run_id for one in found] == job.run_ids
    assert [step_of(one.model) for one in found] == ["step-10", "step-20", "step-30"]
    assert [one.stored for one in found] == [{("p1", 0)}, {("p1", 0)}, frozenset()]
    assert {one.work_dir for one in found} == {inputs.work_dir}
    assert JobInputs.from_json(inputs.to_json()) == inputs


def test_answers_that_are_judged_again_need_neither_the_model_nor_its_files(database, settings):
    with database.write() as session:
        trained = train(session, settings)
        model = {"run": trained.run_id, "checkpoint": 10}
        first = claimed(session, "evaluate", {"model": model})
        rows = [{"prompt_id": "p1", "sample": i, "prompt": "q", "completion": "x", "group": 4} for i in range(2)]
        records = [Resolved({"model_digest": "m"}), Completions(0, rows)]
        apply_records(session, job_id=first.job_id, run_id=first.run_id, attempt=1, records=records)
        next(settings.artifacts_dir.rglob("step-10")).rmdir()
        again = claimed(session, "evaluate", {"model": model, "answers_of": first.run_id})
        inputs = resolve_inputs(session, again, settings)
    assert inputs.source["resolved"] == {"model_digest": "m"}
    assert [(row["sample"], row["prompt"], row["group"]) for row in inputs.source["answers"]] == [
        (0, "q", 4),
        (1, "q", 4),
    ]
    assert inputs.stored == frozenset()


def test_a_server_that_the_worker_does_not_know_is_not_reached(database, settings):
    url = "http://gpu-7:8000"
    with database.write() as session:
        claim = train(session, settings, vllm_server_base_url=url)
        with pytest.raises(UnknownReferenceError, match="not a vLLM server") as caught:
            resolve_inputs(session, claim, settings)
        known = settings.model_copy(update={"vllm_servers": (url,)})
        assert resolve_inputs(session, claim, known).run_id == claim.run_id
    assert caught.value.pointer == "/vllm_server_base_url"
