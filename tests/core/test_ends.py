"""Answers end with every token that the model declares as an end, wherever they are sampled."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_entropy import analyse
from test_evaluation import Memory
from test_perturbation import branch
from test_sft import train as train_on_solutions
from test_trainer_runs import make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from erpo_core.analysis.perturbation_cases import sample
from erpo_core.evaluation import run_evaluation
from erpo_core.generation.transformers import TransformersEngine
from erpo_core.job import JobInputs, ModelInput
from erpo_core.prompts import end_token_id, stop_token_ids
from erpo_core.specs.common import PromptSpec
from erpo_core.specs.evaluate import EvaluateSpec
from erpo_core.specs.perturbation import PerturbationSpec
from tiny_model import make_tiny_model

TEMPLATES_ENDS = [0, 2]
DECLARED = [2, *range(3, 259, 2)]
"""Half of the bytes: answers of a random model are short."""
LENGTH = 40
PROBLEMS = [f"{a} + {a}?" for a in range(8)]


def declare(folder, ends):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ends}))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends")
    (folder / "sums.jsonl").write_text("".join(json.dumps({"problem": p, "answer": "1"}) + "\n" for p in PROBLEMS))
    return declare(make_tiny_model(folder / "tiny"), DECLARED)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def are_declared(answers) -> bool:
    """Whether each answer holds one end that is declared, its last token, and no other."""
    stops = {*TEMPLATES_ENDS, *DECLARED}
    return all([token in stops for token in ids] == [False] * (len(ids) - 1) + [True] for ids in answers)


@pytest.mark.parametrize("declared", [7, [2, 7], [7], None])
def test_a_model_and_its_folder_declare_the_same_ends(tmp_path, declared):
    folder = declare(make_tiny_model(tmp_path), declared)
    model, tokenizer = load(folder)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    expected = TEMPLATES_ENDS if declared is None else [*TEMPLATES_ENDS, 7]
    assert [stop_token_ids(tokenizer, each) for each in (folder, model, adapted)] == [expected] * 3


def test_without_a_file_of_its_own_the_models_configuration_declares_them(tmp_path):
    folder = make_tiny_model(tmp_path)
    (folder / "generation_config.json").unlink()
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [2, 9]}))
    model, tokenizer = load(folder)
    assert stop_token_ids(tokenizer, folder) == stop_token_ids(tokenizer, model) == [0, 2, 9]


def test_a_solution_ends_as_the_template_ends_a_turn_with_what_the_model_declares(tmp_path):
    """As Phi-4's: the end of a turn is in no list of ours, and the tokenizer's own end is another token."""
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path))
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}|<|endoftext|>{% endfor %}"
    end = tokenizer.convert_tokens_to_ids("|")
    declared = stop_token_ids(tokenizer, declare(tmp_path, [0, end]))
    assert end_token_id(tokenizer, PromptSpec(), declared) == end


def test_answers_of_a_training_end_so(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, max_steps=1, max_completion_length=LENGTH)
    trainer.train()
    (batch,) = trainer.rollout_log
    rows = zip(batch.rollouts.completion_ids, batch.rollouts.mask, strict=True)
    assert are_declared(ids[mask].tolist() for ids, mask in rows)
    assert batch.finished.all()


def test_answers_of_a_model_that_is_trained_on_solutions_end_so(tiny, tmp_path, monkeypatch):
    (tmp_path / "sums.jsonl").write_text(json.dumps({"problem": "1?", "answer": "1", "solution": "1."}) + "\n")
    found = []
    generate = TransformersEngine.generate

    def kept(engine, prompts, **call):
        groups = generate(engine, prompts, **call)
        found.extend(sample.token_ids for group in groups for sample in group)
        return groups

    monkeypatch.setattr(TransformersEngine, "generate", kept)
    evaluated = {"eval_every": 1, "eval_benchmarks": ["data:sums.jsonl"], "eval_num_samples": 4}
    evaluated |= {"eval_sampling": {"max_completion_length": LENGTH}}
    train_on_solutions(tiny, tmp_path, tmp_path / "work", max_steps=1, train_batch_size=1, **evaluated)
    assert found
    assert are_declared(found)


def test_answers_of_an_evaluation_end_so(tiny):
    memory = Memory()
    body = {"model": str(tiny), "dataset": "data:sums.jsonl", "num_samples": 1}
    body |= {"sampling": {"max_completion_length": LENGTH}}
    places = {"work_dir": tiny.parent / "work", "cache_dir": tiny.parent / "cache", "data_root": tiny.parent}
    inputs = JobInputs("job", "run", 1, model=ModelInput(str(tiny)), model_roots=(tiny.parent,), **places)
    run_evaluation(EvaluateSpec.model_validate(body), inputs, memory, memory)
    assert [row["truncated"] for row in memory.rows] == [False] * len(PROBLEMS)
    resolved = next(record for record in memory.records if record.kind == "resolved")
    assert resolved.data["stop_token_ids"] == sorted({*TEMPLATES_ENDS, *DECLARED})


def test_answers_of_an_entropy_analysis_end_so(tiny):
    inputs = JobInputs(
        job_id="job",
        run_id="run",
        attempt=1,
        work_dir=tiny.parent / "work",
        cache_dir=tiny.parent / "cache",
        model=ModelInput(str(tiny)),
        model_roots=(tiny.parent,),
    )
    traces, _ = analyse(inputs, prompts=PROBLEMS, sampling={"max_completion_length": LENGTH})
    assert len(traces) == len(PROBLEMS)
    assert max(trace.meta["num_tokens"] for trace in traces) < LENGTH


def test_continuations_of_a_branch_end_so(tiny):
    sink, result = branch(tiny, num_alternatives=16, sampling={"max_completion_length": LENGTH})
    assert [row["truncated"] for row in sink.rows] == [False] * len(sink.rows)
    ends = {one["token_id"] for one in result["branches"]} & set(DECLARED)
    assert ends
    for row in sink.rows:
        if int(row["prompt_id"].partition("/")[2]) in ends:
            assert row["num_tokens"] == 5, "an answer ends with a declared end: nothing is sampled behind it"


def test_continuations_of_a_perturbation_end_so(tiny):
    model, tokenizer = load(tiny)
    spec = {"model": "m", "dataset": "d", "sampling": {"max_completion_length": LENGTH}}
    prompts = [tokenizer(problem, add_special_tokens=False)["input_ids"] for problem in PROBLEMS]
    engine = TransformersEngine(model.to(torch.float32), tokenizer)
    groups = sample(PerturbationSpec.model_validate(spec), engine, prompts, 2, seed=1)
    assert are_declared(answer.token_ids for group in groups for answer in group)
