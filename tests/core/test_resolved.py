"""A later attempt goes on only from what earlier ones worked on."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

from erpo_core.analysis.entropy import run_entropy
from erpo_core.analysis.perturbation import run_perturbation
from erpo_core.errors import RunError
from erpo_core.evaluation import run_evaluation
from erpo_core.job import JobInputs, ModelInput
from erpo_core.resolved import report_resolved
from erpo_core.specs import parse_spec
from erpo_core.trainer.run import run_training
from erpo_core.trainer.sft import run_sft
from tiny_model import make_tiny_model

SHORT = {"sampling": {"max_completion_length": 4}}
TRAINING = {"max_steps": 1, "max_length": 128, "bf16": False, "warmup_steps": 0}
KINDS = {
    "evaluate": ("evaluate", run_evaluation, SHORT),
    "entropy": ("entropy", run_entropy, SHORT),
    "perturbation": ("perturbation", run_perturbation, SHORT),
    "grpo": (
        "train",
        run_training,
        {**TRAINING, "algorithm": "grpo", "num_generations": 2, "generation_batch_size": 2, "preflight": False},
    ),
    "sft": ("train", run_sft, {**TRAINING, "algorithm": "sft", "train_batch_size": 1}),
}


class Sink:
    def __init__(self):
        self.kinds, self.resolved = [], {}

    def emit(self, record):
        self.kinds.append(record.kind)
        if record.kind == "resolved":
            self.resolved = record.data


def write(path, answer=2):
    row = {"problem": "1 + 1?", "answer": str(answer), "solution": f"It is {answer}."}
    path.write_text(json.dumps(row) + "\n")


def attempt(kind, home, resolved):
    name, run, body = KINDS[kind]
    model = str(home / "tiny")
    spec = parse_spec(name, {"model": model, "dataset": "data:sums.jsonl", **body})
    inputs = JobInputs("job", "run", 1, home / "work", home, ModelInput(model), home, (home,), resolved=resolved)
    sink = Sink()
    try:
        run(spec, inputs, sink, SimpleNamespace(requested=False))
    except RunError as error:
        if error.code != "nothing_solved":  # the tiny model's answers to a study: that it was let begin is enough
            return sink, error
    return sink, None


@pytest.mark.parametrize("kind", KINDS)
def test_other_problems_or_another_model_under_the_same_name_are_refused(kind, tmp_path):
    make_tiny_model(tmp_path / "tiny")
    write(tmp_path / "sums.jsonl")
    first, error = attempt(kind, tmp_path, {})
    assert error is None
    found = json.loads(json.dumps(first.resolved))
    assert attempt(kind, tmp_path, found)[1] is None

    write(tmp_path / "sums.jsonl", answer=3)
    sink, error = attempt(kind, tmp_path, found)
    assert error.code == "inputs_changed"
    assert "digest" in error.message
    assert {"resolved", "completions", "metrics", "trace"}.isdisjoint(sink.kinds)

    write(tmp_path / "sums.jsonl")
    make_tiny_model(tmp_path / "tiny", seed=1)
    _, error = attempt(kind, tmp_path, found)
    assert "model_digest" in error.message


def test_what_is_no_content_of_a_name_may_differ(tmp_path):
    before = {"identity": {"digest": "a"}, "versions": {"torch": "1"}, "adapter_digest": None, "gone_digest": "x"}
    now = {"identity": {"digest": "b"}, "versions": {"torch": "2"}, "adapter_digest": None, "new_digest": "y"}
    sink = Sink()
    report_resolved(sink, JobInputs("job", "run", 2, tmp_path, tmp_path, ModelInput("m"), resolved=before), now)
    assert sink.resolved == now
