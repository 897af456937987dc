"""What a specification refers to, checked before anything is queued: models, data sets, runs and their checkpoints.

Nothing is loaded: the heavy libraries stay with the workers.
"""

import time
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.orm import Session

from erpo_core.analysis.given_logprobs import bounded_entropies
from erpo_core.data.datasets import check_dataset
from erpo_core.data.golds import SECONDS_BEFORE_QUEUEING, check_dataset_golds
from erpo_core.errors import DatasetError, NotFoundError, SpecError, UnknownReferenceError
from erpo_core.generation.vllm_server import check_server
from erpo_core.models import check_model_ref
from erpo_core.rewards.functions import check_rewards, judge_answers
from erpo_core.specs import BranchSpec, EvaluateSpec
from erpo_core.specs.common import CheckpointRef, CheckpointsRef, JobOptions
from erpo_core.specs.entropy import AnswerSource
from erpo_core.specs.train import BaseTrainSpec, GrpoTrainSpec
from service.adapter import with_adapter_of
from service.auth import Principal
from service.db import claims
from service.db import datasets as dataset_rows
from service.db import jobs as job_rows
from service.db import runs as run_rows
from service.db import traces as trace_rows
from service.db.engine import Database
from service.settings import Settings
from service.workerview import is_alive

_ABILITY_NAMES = {
    "cuda": "a CUDA device",
    "bitsandbytes": "the extra `bitsandbytes`",
    "deepspeed": "the extra `deepspeed`",
    "vllm": "vLLM",
}


@dataclass
class Admitted:
    """What admission found: the runs that must succeed first; the size of what is worked on, if it is known.

    ``spec``: as it will run, with what it inherits from the run that it starts from.
    ``num_eval_problems``: of each benchmark that a training is evaluated on.
    """

    spec: Any
    depends_on: list[str] = field(default_factory=list)
    num_problems: int | None = None
    num_eval_problems: list[int | None] = field(default_factory=list)
    num_tokens: int | None = None


def admit(database: Database, settings: Settings, principal: Principal, spec: Any) -> Admitted:
    """Check every reference of a valid specification.

    Raises:
        SpecError: with the JSON pointer of the field and the mend.
    """
    _check_text(spec)
    if getattr(spec, "logprobs", None):
        bounded_entropies(spec.logprobs)
    admitted = Admitted(spec)
    if getattr(spec, "answers_of", None):
        with database.read() as session:
            _check_answers(session, principal, spec, admitted)
        return admitted
    with database.read() as session:
        _check_model(session, settings, principal, spec, admitted)
        _check_dependencies(session, principal, spec.job, admitted)
        for ref, pointer in _datasets(spec):
            _check_upload(session, principal, ref.partition("?")[0], pointer)
        if getattr(spec, "source", None):
            _check_source(session, principal, spec.source, admitted)
        if hasattr(spec, "sequence"):
            _check_sequence(session, principal, spec)
    until = time.monotonic() + SECONDS_BEFORE_QUEUEING
    if getattr(spec, "dataset", None):
        imitates = getattr(spec, "algorithm", None) == "sft"
        admitted.num_problems = check_dataset(spec.dataset, settings.data_root, with_solutions=imitates)
        if _reads_golds(spec):
            check_dataset_golds(spec.dataset, settings.data_root, until=until)
    if isinstance(spec, GrpoTrainSpec):
        _check_enough(spec, admitted.num_problems)
    for ref, pointer in _eval_benchmarks(spec):
        admitted.num_eval_problems.append(check_dataset(ref, settings.data_root, pointer=pointer))
        check_dataset_golds(ref, settings.data_root, pointer=pointer, until=until)
    if hasattr(spec, "rewards"):
        check_rewards(spec.rewards)
    check_server(getattr(spec, "vllm_server_base_url", None), settings.vllm_servers)
    _check_workers(database, settings, spec)
    return admitted


def _reads_golds(spec: Any) -> bool:
    """Evaluations and analyses may judge answers; of trainings those that reward by it."""
    if isinstance(spec, BaseTrainSpec):
        return isinstance(spec, GrpoTrainSpec) and judge_answers(spec.rewards)
    return True


def _check_enough(spec: GrpoTrainSpec, num_problems: int | None) -> None:
    """The worker refuses a data set that does not make one step."""
    if num_problems is not None and num_problems < spec.prompts_per_step:
        raise DatasetError(
            f"a step needs {spec.prompts_per_step} problems and the data set has {num_problems}",
            pointer="/generation_batch_size",
            mend=f"lower it to {num_problems * spec.num_generations}, or name a data set with more problems",
        )


def _check_workers(database: Database, settings: Settings, spec: Any) -> None:
    """Where workers live, one of them must have all that the order asks for. Where none lives, it waits for one."""
    wanted = _abilities(spec)
    spans_devices = isinstance(spec, BaseTrainSpec) or getattr(spec, "engine", None) == "vllm"
    num_gpus = spec.hardware.num_gpus if spans_devices else 0
    if not wanted and num_gpus < 2:
        return
    with database.read() as session:
        known = [worker.abilities for worker in claims.list_workers(session) if is_alive(worker, settings)]
    able = [have for have in known if have is None or set(wanted) <= set(have)]
    if not known or any(_may_have_devices(have, num_gpus) for have in able):
        return
    if able:
        raise SpecError(
            f"no running worker has {num_gpus} CUDA devices",
            pointer="/hardware/num_gpus",
            mend="write fewer, or start a worker that has as many; GET /workers lists them",
            code="no_worker_able",
        )
    missing = next((name for name in wanted if all(name not in have for have in known)), next(iter(wanted)))
    raise SpecError(
        f"no running worker has {_ABILITY_NAMES[missing]}",
        pointer=wanted[missing],
        mend="leave it out, or start a worker that has it; GET /workers lists them",
        code="no_worker_able",
    )


def _may_have_devices(abilities: list[str] | None, count: int) -> bool:
    """Of a worker that says how many it has (``cuda:N``); any other may: on CPUs there are as many processes."""
    counts = [int(name.removeprefix("cuda:")) for name in abilities or () if name.startswith("cuda:")]
    return not counts or max(counts) >= count


def _abilities(spec: Any) -> dict[str, str]:
    """What a worker must have, and the field that asks for it."""
    found = {}
    if getattr(spec, "load_in_4bit", False):
        found |= {"cuda": "/load_in_4bit", "bitsandbytes": "/load_in_4bit"}
    if isinstance(spec, BaseTrainSpec) and spec.hardware.uses_deepspeed:
        found["deepspeed"] = "/hardware/strategy"
    if getattr(spec, "use_vllm", False) and spec.vllm_mode == "colocate":
        found["vllm"] = "/use_vllm"
    if getattr(spec, "engine", None) == "vllm":
        found["vllm"] = "/engine"
    return found


def _datasets(spec: Any) -> list[tuple[str, str]]:
    """Every data set that a specification names, and where."""
    own = [(spec.dataset, "/dataset")] if getattr(spec, "dataset", None) else []
    return own + _eval_benchmarks(spec)


def _eval_benchmarks(spec: Any) -> list[tuple[str, str]]:
    return [(ref, f"/eval_benchmarks/{index}") for index, ref in enumerate(getattr(spec, "eval_benchmarks", ()))]


def _check_upload(session: Session, principal: Principal, dataset: str, pointer: str) -> None:
    """An uploaded data set belongs to somebody; other forms of names are checked without the database."""
    if not dataset.startswith("ds_"):
        return
    try:
        principal.check_sees(dataset_rows.get_dataset(session, dataset).owner, f"data set {dataset}")
    except NotFoundError:
        raise UnknownReferenceError(
            f"there is no data set {dataset}", pointer=pointer, mend="name one that GET /datasets lists"
        ) from None


def _check_model(session: Session, settings: Settings, principal: Principal, spec: Any, admitted: Admitted) -> None:
    model = spec.model
    if not isinstance(model, CheckpointRef | CheckpointsRef):
        if getattr(spec, "logprobs", None):
            return  # Whose log-probabilities these are: it is not loaded, and need not be known.
        # Trained weights of a run are reached by the run's id, so that its owner is checked: not by their folder.
        check_model_ref(model, settings.model_roots)
        return
    run = _visible_run(session, principal, model.run, "/model/run")
    if run.kind != "train":
        raise UnknownReferenceError(
            f"{run.id} is a run of kind {run.kind}; only a training leaves checkpoints",
            pointer="/model/run",
            mend="name a run of kind train; GET /runs?kind=train lists them",
        )
    if isinstance(spec, BaseTrainSpec):
        admitted.spec = with_adapter_of(spec, run)
    if not job_rows.get_job(session, run.job_id).is_terminal:
        admitted.depends_on.append(run.id)
        return
    if isinstance(model, CheckpointRef):
        _check_checkpoint(session, run.id, model.checkpoint, "/model/checkpoint")
        return
    steps: list[int] = []
    for index, wanted in enumerate(model.checkpoints):
        steps.append(_check_checkpoint(session, run.id, wanted, f"/model/checkpoints/{index}"))
        if steps[-1] in steps[:-1]:
            raise SpecError(
                f"{wanted!r} is the checkpoint of step {steps[-1]}, which is named already",
                pointer=f"/model/checkpoints/{index}",
                mend="name each checkpoint once",
            )


def _check_checkpoint(session: Session, run_id: str, wanted: str | int, pointer: str) -> int:
    """Its step."""
    found = run_rows.find_checkpoint(session, run_id, wanted)
    if found is not None:
        return found.step
    steps = [row.step for row in run_rows.list_checkpoints(session, run_id)]
    known = f"write one of {sorted(steps)}, `last` or `best`" if steps else "name a run that has saved a checkpoint"
    raise UnknownReferenceError(f"{run_id} has no checkpoint {wanted!r}", pointer=pointer, mend=known)


def _check_answers(session: Session, principal: Principal, spec: EvaluateSpec, admitted: Admitted) -> None:
    """An evaluation that judges another one's answers samples none: its model and its data may be gone by now."""
    _check_dependencies(session, principal, spec.job, admitted)
    run = _visible_run(session, principal, spec.answers_of, "/answers_of")
    if run.kind != "evaluate" or not run_rows.size_of_answers(session, run.id, step=None, limit=1)[0]:
        raise UnknownReferenceError(
            f"{run.id} is no evaluation with stored answers",
            pointer="/answers_of",
            mend="name one that GET /runs?kind=evaluate lists and that has answers",
        )
    if not job_rows.get_job(session, run.job_id).is_terminal:
        raise SpecError(
            f"{run.id} is not finished", pointer="/answers_of", mend="wait until its job has ended", code="not_finished"
        )
    asked = EvaluateSpec.model_validate(run.spec)
    for name in EvaluateSpec.model_fields:
        if name not in ("job", "answers_of") and getattr(spec, name) != getattr(asked, name):
            raise SpecError(
                f"{run.id} was asked with another {name}",
                pointer=f"/{name}",
                mend=f"order it by POST /evaluations/{run.id}/verify, which repeats its request",
            )


def _check_source(session: Session, principal: Principal, source: AnswerSource, admitted: Admitted) -> None:
    run = _visible_run(session, principal, source.run, "/source/run")
    if not job_rows.get_job(session, run.job_id).is_terminal:
        admitted.depends_on.append(run.id)
        return
    count, admitted.num_tokens = run_rows.size_of_answers(session, run.id, step=source.step, limit=source.limit)
    if not count:
        where = "" if source.step is None else f" at step {source.step}"
        raise UnknownReferenceError(
            f"{run.id} has stored no answers{where}",
            pointer="/source/run" if source.step is None else "/source/step",
            mend="name an evaluation or a training; GET /runs/{id}/completions shows what it has",
        )


def _check_sequence(session: Session, principal: Principal, spec: BranchSpec) -> None:
    try:
        row = trace_rows.find_sequence(session, spec.sequence)
        run = run_rows.get_run(session, row.run_id)
        principal.check_sees(job_rows.get_job(session, run.job_id).owner, f"sequence {spec.sequence}")
    except NotFoundError:
        raise UnknownReferenceError(
            f"there is no sequence {spec.sequence}",
            pointer="/sequence",
            mend="name the `id` of one that GET /analyze/entropy/{id}/sequences or /runs/{id}/traces lists",
        ) from None
    if not row.origin.get("exact", True):
        raise SpecError(
            "the ids of its tokens are not known: it is of given log-probabilities",
            pointer="/sequence",
            mend="analyse its text with the model itself (`texts`), and branch from that",
        )
    if spec.position >= row.num_tokens:
        raise SpecError(
            f"the answer has {row.num_tokens} tokens", pointer="/position", mend=f"write at most {row.num_tokens - 1}"
        )


def _check_dependencies(session: Session, principal: Principal, options: JobOptions, admitted: Admitted) -> None:
    for index, run_id in enumerate(options.depends_on):
        run = _visible_run(session, principal, run_id, f"/job/depends_on/{index}")
        if run.id not in admitted.depends_on:
            admitted.depends_on.append(run.id)


def _visible_run(session: Session, principal: Principal, run_id: str, pointer: str) -> Any:
    try:
        run = run_rows.get_run(session, run_id)
        principal.check_sees(job_rows.get_job(session, run.job_id).owner, f"run {run_id}")
    except NotFoundError:
        raise UnknownReferenceError(
            f"there is no run {run_id}", pointer=pointer, mend="name a run that GET /runs lists"
        ) from None
    return run


def _check_text(spec: Any) -> None:
    """NUL characters are legal JSON and illegal text in PostgreSQL."""
    found = _find_nul(spec.model_dump(mode="json"), "")
    if found is not None:
        raise SpecError("a NUL character", pointer=found, mend="remove the NUL character (\\u0000)")


def _find_nul(value: Any, pointer: str) -> str | None:
    if isinstance(value, str):
        return pointer if "\0" in value else None
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(key, str) and "\0" in key:
            return pointer
        found = _find_nul(item, f"{pointer}/{key}")
        if found is not None:
            return found
    return None
