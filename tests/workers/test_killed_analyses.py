"""Analyses whose child is killed with SIGKILL, and which are tried again: they go on from what is stored."""

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from db_rows import call, claim, finish, history, job_of, run_of, store

from erpo_core.records import from_wire, to_wire
from erpo_core.specs import parse_spec
from service.db import jobs, runs, traces
from service.settings import Settings
from tiny_model import make_tiny_model, teach
from workers.child.__main__ import entry_of
from workers.resolve import resolve_inputs

pytest.importorskip("torch")
pytestmark = pytest.mark.timeout(600)

RUNNING = SimpleNamespace(requested=False)
PROMPT, ANSWER = "1 + 1?", "We add. It is \\boxed{2}."
SAMPLED = {
    "prompts": ["1 + 1?", "2 + 2?", "3 + 3?"],
    "num_samples": 2,
    "batch_size": 2,
    "sampling": {"max_completion_length": 12},
}
PERTURBATION = {
    **{"dataset": "data:sums.jsonl", "num_attempts": 2, "num_continuations": 3, "batch_size": 3, "fraction": 0.15},
    **{"sampling": {"max_completion_length": 30, "temperature": 0.3}, "policy": "uniform_vocab"},
}
BRANCH = {
    **{"position": 4, "num_alternatives": 3, "num_continuations": 2, "batch_size": 2, "gold": "2"},
    **{"sampling": {"max_completion_length": 30, "temperature": 0.3}},
}


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A tiny model that solves two of three problems, which lie beside it."""
    path = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", hidden_size=64)
    teach(path, PROMPT, ANSWER)
    problems = [("easy", PROMPT, "2"), ("hard", PROMPT + " ", "3"), ("again", PROMPT, "2")]
    lines = [json.dumps({"id": name, "problem": text, "answer": gold}) for name, text, gold in problems]
    (path.parent / "sums.jsonl").write_text("\n".join(lines))
    return path


@pytest.fixture
def settings(tmp_path, taught):
    command = (sys.executable, str(Path(__file__).with_name("mortal_child.py")))
    roots = {"model_roots": (taught.parent,), "data_root": taught.parent, "cache_dir": taught.parent / "cache"}
    return Settings(data_dir=tmp_path / "data", lease_seconds=60, child_command=command, **roots)


@pytest.fixture
def submit(database, taught):
    def create(kind: str, spec: dict) -> str:
        with database.write() as session:
            job = jobs.create_job(session, kind=kind, spec={"model": str(taught)} | spec, options={})
            session.flush()
            return job.id

    return create


@pytest.fixture
def run_here(database, settings, submit):
    """Run a job to its end in this process; its run's id."""

    def run(kind: str, spec: dict) -> str:
        submit(kind, spec)
        owned = claim(database)
        with database.read() as session:
            inputs = resolve_inputs(session, owned, settings)
        sent = []
        entry_of(kind)(parse_spec(kind, owned.spec), inputs, SimpleNamespace(emit=sent.append), RUNNING)
        store(database, owned, *(from_wire(*to_wire(record)) for record in sent))
        finish(database, owned, "succeeded")
        return owned.run_id

    return run


@pytest.fixture
def run_killed(database, desk, submit, tmp_path, monkeypatch):
    """Run a job through deaths, tried again after each; (its run's id, calls of the model by attempt)."""

    def run(kind: str, spec: dict, deaths: list) -> tuple[str, list[Counter]]:
        job_id, diary = submit(kind, spec), tmp_path / "diary.jsonl"
        monkeypatch.setenv("ERPO_DEATHS", json.dumps(deaths))
        monkeypatch.setenv("ERPO_DIARY", str(diary))
        for _ in deaths:
            assert desk.ring() == 1
            # Where the machine kills for want of memory at the same moment, whoever it is, that is taken for the cause.
            assert job_of(database, job_id).status_reason in ("child_killed", "oom"), job_of(database, job_id).error
            call(database, jobs.retry_job, job_id)
        assert desk.ring() == 1
        assert job_of(database, job_id).status == "succeeded", job_of(database, job_id).error
        calls = [Counter() for _ in range(len(deaths) + 1)]
        for attempt, name in map(json.loads, diary.read_text().splitlines()):
            calls[attempt - 1][name] += 1
        return job_of(database, job_id).run_id, calls

    return run


def left(database, run_id: str) -> tuple:
    """What a run has left: its result, its traces and its answers, by their names."""
    result = {name: value for name, value in run_of(database, run_id).result.items() if name != "seconds"}
    with database.read() as session:
        rows = traces.list_sequences(session, run_id, limit=200).rows
        numbers = [(row.n, row.prompt_id, row.sample, row.completion, row.stats, row.histogram) for row in rows]
        stored = list(traces.stored_traces(session, run_id))
        answers = runs.stored_answers(session, run_id)
    return result, numbers, stored, sorted(answers, key=lambda row: (row["prompt_id"], row["sample"]))


def stored_numbers(database, run_id: str) -> list[int]:
    """``n`` of every trace, as often as it was stored."""
    return [event.data["n"] for event in history(database, run_of(database, run_id).job_id, "trace.batch")]


def test_a_killed_analysis_goes_on_from_the_answers_that_are_stored(run_killed, run_here, database):
    # Killed between two answers of the second batch: its first answer is not scored again.
    killed, calls = run_killed("entropy", SAMPLED, [["trace", 3]])
    assert calls == [{"generate": 2, "score": 3}, {"generate": 2, "score": 3}]
    assert stored_numbers(database, killed) == list(range(6))
    assert left(database, killed) == left(database, run_here("entropy", SAMPLED))


def test_a_killed_perturbation_samples_nothing_again_that_is_stored(run_killed, run_here, database):
    # Killed once the first problem's attempts are stored, and again between the arms of the first answer.
    killed, calls = run_killed("perturbation", PERTURBATION, [["completions", 1], ["completions", 4]])
    assert [found["generate"] for found in calls] == [1, 2 + 2, 2 * 5 - 2]
    assert stored_numbers(database, killed) == [0, 1]
    assert left(database, killed) == left(database, run_here("perturbation", PERTURBATION))


def test_a_killed_tree_of_branches_samples_nothing_again_that_is_stored(run_killed, run_here, database):
    analysis = run_here("entropy", {"texts": [{"prompt": PROMPT, "response": ANSWER}]})
    with database.read() as session:
        spec = BRANCH | {"sequence": traces.get_sequence(session, analysis, 0).id}
    killed, calls = run_killed("branch", spec, [["completions", 1]])
    assert [found["generate"] for found in calls] == [1, 2]
    assert left(database, killed) == left(database, run_here("branch", spec))
