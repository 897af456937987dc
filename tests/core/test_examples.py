"""Every file in ``examples/`` does what it says."""

import json
import runpy
from pathlib import Path

import pytest

from erpo_core.specs import parse_spec

EXAMPLES = Path(__file__).parents[2] / "examples"
BODIES = sorted(EXAMPLES.glob("qwen*.json"))
PAPERS = [f"qwen2.5-{size}-{algorithm}" for size in ("1.5b", "3b", "7b") for algorithm in ("erpo", "grpo", "sft")]


def test_the_papers_models_and_algorithms_are_there():
    assert [path.stem for path in BODIES] == PAPERS


@pytest.mark.parametrize("path", BODIES, ids=lambda path: path.stem)
def test_a_body_is_valid_is_what_its_name_says_and_keeps_the_papers_defaults(path):
    body = json.loads(path.read_text())
    spec = parse_spec("train", body)
    family, size, algorithm = path.stem.split("-")
    assert spec.model.lower() == f"qwen/{family}-{size}"
    assert spec.algorithm == algorithm
    assert spec.prompt.template == "qwen-boxed"
    assert spec.dataset.endswith("?level=3-5")
    assert spec.model_fields_set <= {"algorithm", "model", "dataset", "prompt", "gradient_checkpointing", "job"}


def test_the_perturbation_that_is_told_of_can_be_ordered_again():
    parse_spec("perturbation", json.loads((EXAMPLES / "perturbation_smollm2.json").read_text()))


def test_the_script_trains_and_saves_an_adapter_that_loads(tmp_path):
    pytest.importorskip("torch")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from tiny_model import make_tiny_model

    tiny = make_tiny_model(tmp_path / "tiny")
    train = runpy.run_path(str(EXAMPLES / "library_use.py"))["train"]
    trainer = train(str(tiny), str(tmp_path / "out"), max_steps=1, max_completion_length=4)
    assert trainer.state.global_step == 1
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "out")


def test_the_readme_names_every_example():
    text = (EXAMPLES / "README.md").read_text()
    assert "qwen2.5-{1.5b,3b,7b}-{erpo,grpo,sft}.json" in text
    for path in EXAMPLES.glob("*.py"):
        assert f"`{path.name}`" in text
