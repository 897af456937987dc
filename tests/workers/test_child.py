"""``python -m workers.child`` as its supervisor starts it."""

import json
import os
import subprocess
import sys

import pytest

from erpo_core.job import JobInputs, ModelInput
from erpo_core.records import Ended
from workers.processes import ATTEMPT_VARIABLE
from workers.recorder import Recorder


@pytest.fixture
def run_child(tmp_path):
    def run(kind: str, spec: dict, mark: str) -> tuple[subprocess.CompletedProcess, Ended]:
        inputs = JobInputs("job_x", "run_x", 1, tmp_path / "work", tmp_path / "cache", ModelInput("nowhere"))
        path = tmp_path / "job.json"
        path.write_text(json.dumps({"kind": kind, "spec": spec, "inputs": inputs.to_json()}))
        with Recorder(lambda records: None) as recorder:
            done = subprocess.run(
                [sys.executable, "-m", "workers.child", str(path)],
                env=os.environ | {"ERPO_RECORD_SOCKET": str(recorder.path), ATTEMPT_VARIABLE: mark},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            recorder.drain(5)
            return done, recorder.ended

    return run


def test_an_unknown_kind_is_a_failure_with_a_code_and_not_a_crash(run_child):
    done, ended = run_child("no such kind", {}, "job_k:1")
    assert done.returncode == 0
    assert (ended.status, ended.code) == ("failed", "invalid_spec")


def test_a_specification_that_does_not_validate_is_a_failure_that_names_the_field(run_child):
    done, ended = run_child("train", {"model": "tiny", "dataset": "x", "num_generations": 1}, "job_s:1")
    assert done.returncode == 0
    assert (ended.status, ended.code) == ("failed", "invalid_spec")
    assert "num_generations" in ended.message
    assert "Traceback" in done.stderr


def test_the_child_knows_neither_the_service_nor_celery_and_starts_without_torch():
    code = (
        "import sys, workers.child.__main__;"
        "print([name for name in ('torch', 'celery', 'sqlalchemy', 'service', 'fastapi') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
