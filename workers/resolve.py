"""From a claimed job to what its child needs: a model reference becomes names and local paths."""

from base64 import b64encode
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from stat import S_ISDIR
from typing import Any

from sqlalchemy.orm import Session

from erpo_core.checkpoints import is_whole
from erpo_core.errors import UnknownReferenceError
from erpo_core.generation.vllm_server import check_server
from erpo_core.job import JobInputs, ModelInput
from service.db import jobs, runs, traces
from service.db.claims import KEEPS_RECORDS, Claim
from service.db.models import Run
from service.settings import Settings

_DEPTH = 32


def resolve_inputs(session: Session, claim: Claim, settings: Settings) -> JobInputs:
    """Everything that the child of this attempt gets beside its specification.

    Raises:
        UnknownReferenceError: a run or a checkpoint that the model names is not there (any more), or the worker does
            not know the vLLM server.
    """
    check_server(claim.spec.get("vllm_server_base_url"), settings.vllm_servers)
    inputs = JobInputs(
        job_id=claim.job_id,
        run_id=claim.run_id,
        attempt=claim.attempt,
        work_dir=settings.artifacts_dir / "runs" / claim.run_id / f"attempt-{claim.attempt}",
        cache_dir=settings.cache_dir,
        model=_model(session, claim),
        data_root=settings.data_root,
        # A run that trained every weight is a base model for others, and lies among the artifacts.
        model_roots=(*settings.model_roots, settings.artifacts_dir),
        resume_from=_resume_from(session, claim),
        stored_rows=_stored_rows(session, claim, claim.run_id),
        stored_traces=_stored_traces(session, claim),
        source=_source(session, claim),
        resolved=_resolved(session, claim.run_id),
    )
    more = jobs.get_job(session, claim.job_id).more_run_ids
    return replace(inputs, also=tuple(_of_run(session, claim, inputs, run_id) for run_id in more))


def _of_run(session: Session, claim: Claim, inputs: JobInputs, run_id: str) -> JobInputs:
    """Those of a further run of the job."""
    model = _model_of(session, _get_run(session, run_id))
    rows, resolved = _stored_rows(session, claim, run_id), _resolved(session, run_id)
    return replace(inputs, run_id=run_id, model=model, stored_rows=rows, stored_traces=(), resolved=resolved)


def _get_run(session: Session, run_id: str) -> Run:
    """A run that may have been deleted since it was named: what was admitted runs, and the files are there."""
    return jobs.get_run(session, run_id, or_deleted=True)


def _resolved(session: Session, run_id: str) -> dict[str, Any]:
    return _get_run(session, run_id).resolved or {}


def _model(session: Session, claim: Claim) -> ModelInput:
    if claim.spec.get("answers_of"):
        return ModelInput("")  # nothing is loaded to judge stored answers: the checkpoint may be gone
    return _model_of(session, _get_run(session, claim.run_id))


def resolve_model(session: Session, reference: str | dict[str, Any]) -> ModelInput:
    """A name stays a name; a run's checkpoint becomes the base under it and its adapter's folder, or a base itself.

    Raises:
        UnknownReferenceError: the run has no such checkpoint, or files of it or of its base are gone.
    """
    if isinstance(reference, str):
        return ModelInput(reference)
    run = _get_run(session, reference["run"])
    folder = _checkpoint_folder(session, run.id, reference.get("checkpoint", "last"))
    return ModelInput(_base_of(session, run), folder) if _has_adapter(run) else ModelInput(str(folder))


def _model_of(session: Session, run: Run) -> ModelInput:
    """What a run works on."""
    parent = _parent(session, run)
    if parent is not None and _has_adapter(parent):
        return resolve_model(session, run.spec["model"])
    return ModelInput(_base_of(session, run))


def _base_of(session: Session, run: Run, depth: int = 0) -> str:
    """The base that a run works on: once an attempt has loaded it, that one, whatever came after it.

    What is named may be something else by then: a hub's newest commit, the last checkpoint of a run that went on. Of
    the runs whose adapters lie between, no checkpoint need be there any more.
    """
    if depth > _DEPTH:
        raise UnknownReferenceError("runs that start from one another in a circle", pointer="/model")
    parent, found = _parent(session, run), runs.loaded_base(run)
    if parent is not None and _has_adapter(parent):
        return _base_of(session, parent, depth + 1)
    if found is None:
        return resolve_model(session, run.spec["model"]).base
    return found if parent is None else str(_existing(Path(found)))


def _parent(session: Session, run: Run) -> Run | None:
    """The run whose checkpoint this one works on."""
    model = run.spec["model"]
    return None if isinstance(model, str) else _get_run(session, model["run"])


def _has_adapter(run: Run) -> bool:
    """Are the checkpoints of a training adapters, or has it trained every weight?"""
    return run.spec.get("lora", True) is not None


def _checkpoint_folder(session: Session, run_id: str, wanted: str | int) -> Path:
    found = runs.find_checkpoint(session, run_id, wanted)
    if found is None:
        raise UnknownReferenceError(
            f"run {run_id} has no checkpoint {wanted!r}", pointer="/model", mend=f"see GET /runs/{run_id}/checkpoints"
        )
    return _existing(Path(found.path))


def checkpoint_folders(session: Session, claim: Claim) -> dict[int, Path]:
    """{step: folder} of what a training could resume from, the oldest first."""
    if claim.kind != "train":
        return {}
    return {row.step: Path(row.path) for row in runs.list_checkpoints(session, claim.run_id)}


def damaged_checkpoints(folders: dict[int, Path]) -> list[int]:
    """Steps to forget: their files are gone (an attempt that was killed had removed them and could not say so), or they
    are later than the newest whose files are as they were written. Where all of an attempt's files are gone, a disk is
    missing and nothing is forgotten. Reads the newest to its end: minutes, where every weight was trained.

    Raises:
        UnknownReferenceError: ``checkpoint_missing``: files that may be there cannot be read. Nothing is to be
            forgotten.
    """
    if not folders or _is_gone(folders[max(folders)].parent):
        return []
    gone = [step for step, folder in folders.items() if _is_gone(folder) and not _is_gone(folder.parent)]
    there = sorted((step for step, folder in folders.items() if not _is_gone(folder)), reverse=True)
    return gone + list(takewhile(lambda step: not _is_whole(folders[step]), there))


def _is_gone(folder: Path) -> bool:
    """Whether it is known that there is no such folder; a disk that does not answer tells nothing."""
    try:
        return not S_ISDIR(folder.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False


def _is_whole(folder: Path) -> bool:
    try:
        return is_whole(folder)
    except OSError as error:
        raise _unreadable(folder, error) from error


def surplus_checkpoints(session: Session, claim: Claim) -> dict[int, Path]:
    """{step: folder} of what is over ``save_total_limit``, the best beside the last ones, and no training's base.

    Of the whole run: a trainer rotates those of its own attempt alone.
    """
    folders, limit = checkpoint_folders(session, claim), claim.spec.get("save_total_limit")
    if limit is None or len(folders) <= limit:
        return {}
    kept = {*sorted(folders)[-limit:], runs.find_checkpoint(session, claim.run_id, "best").step}
    bases = runs.bases_of_trainings(session, claim.run_id)
    return {step: folder for step, folder in folders.items() if step not in kept and str(folder) not in bases}


def _resume_from(session: Session, claim: Claim) -> Path | None:
    folders = checkpoint_folders(session, claim)
    return _existing(folders[max(folders)]) if folders else None


def _existing(folder: Path) -> Path:
    if _is_gone(folder):
        raise UnknownReferenceError(
            f"the files of the checkpoint {folder} are gone", code="checkpoint_missing", mend="mount what holds them"
        )
    try:
        next(folder.iterdir(), None)
    except OSError as error:
        raise _unreadable(folder, error) from error
    return folder


def _unreadable(folder: Path, error: OSError) -> UnknownReferenceError:
    return UnknownReferenceError(
        f"the files of the checkpoint {folder} cannot be read ({error.strerror or error}); nothing was forgotten. "
        "Retry the job once they can be read; a training goes back behind a checkpoint whose folder is deleted",
        code="checkpoint_missing",
        mend="see to the disk that holds them",
    )


def _stored_rows(session: Session, claim: Claim, run_id: str) -> tuple[dict[str, Any], ...]:
    if claim.kind not in KEEPS_RECORDS or claim.attempt == 1:
        return ()
    return tuple(runs.stored_answers(session, run_id))


def _stored_traces(session: Session, claim: Claim) -> tuple[dict[str, Any], ...]:
    if claim.kind not in KEEPS_RECORDS or claim.attempt == 1:
        return ()
    found = traces.stored_traces(session, claim.run_id)
    return tuple(trace | {"blob": b64encode(trace["blob"]).decode()} for trace in found)


def _source(session: Session, claim: Claim) -> dict[str, Any] | None:
    """What an analysis of stored things works on."""
    if claim.kind == "branch":
        return _stored_sequence(session, claim.spec["sequence"])
    if claim.spec.get("answers_of"):
        run = _get_run(session, claim.spec["answers_of"])
        return {"resolved": run.resolved, "answers": runs.stored_answers(session, run.id, with_prompt=True)}
    source = claim.spec.get("source") if claim.kind == "entropy" else None
    if source is None:
        return None
    answers = runs.answers_to_analyse(session, source["run"], step=source["step"], limit=source["limit"])
    if not answers:
        raise UnknownReferenceError(f"run {source['run']} has stored no answers", pointer="/source/run")
    return {"prompt_spec": _prompt_spec(session, source["run"]), "answers": answers}


def _stored_sequence(session: Session, sequence_id: str) -> dict[str, Any]:
    row = traces.find_sequence(session, sequence_id)
    return {
        "prompt": row.prompt,
        "prompt_spec": _prompt_spec(session, row.run_id),
        "token_ids": traces.trace_reader(session, row).columns(["token_ids"])["token_ids"].tolist(),
        "gold": traces.gold_of(session, row),
        "tokenizer_digest": row.origin.get("tokenizer_digest"),
    }


def _prompt_spec(session: Session, run_id: str) -> dict[str, Any]:
    """How the run's problems became prompts: an analysis of stored answers used that of the run which sampled them."""
    spec = _get_run(session, run_id).spec
    return _prompt_spec(session, spec["source"]["run"]) if spec.get("source") else spec.get("prompt", {})
