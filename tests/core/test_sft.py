"""Supervised fine-tuning on solutions: what is read, what is learnt, records, checkpoints, resume."""

import json
import math

import pytest
from test_trainer import Records
from transformers import AutoModelForCausalLM, AutoTokenizer

from erpo_core.checkpoints import is_whole, list_steps
from erpo_core.data.formats import Problem
from erpo_core.errors import DatasetError
from erpo_core.job import JobInputs, ModelInput
from erpo_core.metric_names import describe
from erpo_core.prompts import end_token_id, prompt_ids
from erpo_core.specs import parse_spec
from erpo_core.specs.common import PromptSpec
from erpo_core.specs.train import BaseTrainSpec, SftTrainSpec
from erpo_core.trainer.data import boxed_solution, make_solution_dataset
from erpo_core.trainer.sft import PASSED_THROUGH, SolutionTrainer, make_sft_config, run_sft
from tiny_model import make_tiny_model, make_tiny_tokenizer

DERIVED = {"algorithm", "bf16", "dataset", "hardware", "job", "load_in_4bit", "lora", "model", "prompt"}
DERIVED |= {"train_batch_size", "eval_every", "eval_benchmarks", "eval_num_samples", "eval_limit", "eval_sampling"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    rows = [{"problem": f"{a} + 1?", "answer": a + 1, "solution": f"{a} + 1 = {a + 1}."} for a in range(8)]
    rows.append({"problem": "9 + 1?", "answer": 10})
    rows.append({"problem": "long?", "answer": 1, "solution": "so " * 200})
    (root / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def train(tiny, data_root, work_dir, *, stop_after=None, resume_from=None, **changes) -> Records:
    body = {
        "algorithm": "sft",
        "model": str(tiny),
        "dataset": "data:sums.jsonl",
        "max_length": 128,
        "train_batch_size": 4,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_steps": 6,
        "save_steps": 3,
        "lora": {"r": 8, "lora_alpha": 16},
    }
    inputs = JobInputs(
        job_id="job",
        run_id="run",
        attempt=1,
        work_dir=work_dir,
        cache_dir=work_dir / "cache",
        model=ModelInput(str(tiny)),
        data_root=data_root,
        model_roots=(tiny.parent,),
        resume_from=resume_from,
    )
    records = Records(stop_after)
    run_sft(parse_spec("train", body | changes), inputs, records, records)
    return records


def test_a_step_whose_gradient_is_not_finite_is_skipped(tiny, data_root, tmp_path, monkeypatch):
    compute = SolutionTrainer.compute_loss

    def broken(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 1 else loss

    monkeypatch.setattr(SolutionTrainer, "compute_loss", broken)
    records = train(tiny, data_root, tmp_path, max_steps=3)
    metrics = [record.values for record in records.by_kind["metrics"]]
    assert [values["erpo/skipped_steps"] for values in metrics] == [0, 1, 1]
    assert [math.isfinite(values["loss"]) for values in metrics] == [True, False, True]
    assert [event.type for event in records.by_kind["event"]].count("step.skipped") == 1


def test_each_field_of_the_spec_reaches_trls_trainer_under_its_name(tmp_path):
    assert set(SftTrainSpec.model_fields) == set(PASSED_THROUGH) | DERIVED
    assert set(BaseTrainSpec.model_fields) | {"algorithm", "train_batch_size"} == set(SftTrainSpec.model_fields)
    spec = parse_spec("train", {"algorithm": "sft", "model": "m", "dataset": "d", "seed": 7, "train_batch_size": 6})
    config = make_sft_config(spec, tmp_path, bf16=False)
    for name in PASSED_THROUGH:
        assert getattr(config, name) == getattr(spec, name), name
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 6


def test_a_row_is_the_prompt_of_an_evaluation_and_the_boxed_solution_and_its_end():
    tokenizer = make_tiny_tokenizer()
    problem = Problem("p", "2 + 2?", "4", solution="2 + 2 = 4.")
    spec = parse_spec("train", {"algorithm": "sft", "model": "m", "dataset": "d", "prompt": {"template": "qwen-boxed"}})
    (row,), dropped = make_solution_dataset(tokenizer, [problem], spec, [0, 2])
    prompt = prompt_ids(tokenizer, problem.problem, spec.prompt)
    solution = "2 + 2 = 4.\nThe answer is \\boxed{4}."
    assert tokenizer.decode(row["input_ids"]) == tokenizer.decode(prompt) + solution + "<|im_end|>"
    assert row["labels"] == [-100] * len(prompt) + row["input_ids"][len(prompt) :]
    assert dropped == 0


def test_a_solution_that_has_a_box_stays_as_it_is():
    assert boxed_solution(Problem("p", "q", "4", solution=" so \\boxed{4} ")) == "so \\boxed{4}"


def test_an_answer_ends_as_the_template_ends_a_turn():
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"  # as Qwen2.5's base models have it
    assert tokenizer.decode(end_token_id(tokenizer, PromptSpec(), [0, 2])) == "<|im_end|>"
    assert tokenizer.decode(end_token_id(tokenizer, PromptSpec(template="raw"), [0, 2])) == "<|endoftext|>"


def test_problems_without_solutions_are_refused(tiny, data_root, tmp_path):
    with pytest.raises(DatasetError, match="no worked solutions"):
        train(tiny, data_root, tmp_path, dataset="reasoning-gym:chain_sum?size=8")
    with pytest.raises(DatasetError, match="longer than 8 tokens"):
        train(tiny, data_root, tmp_path, max_length=8)


@pytest.mark.parametrize("lora", [{"r": 8, "lora_alpha": 16}, None])
def test_the_loss_falls_and_the_checkpoint_is_what_was_learnt(tiny, data_root, tmp_path, lora):
    import torch
    from peft import PeftModel

    rate = 2e-2 if lora else 5e-3
    records = train(tiny, data_root, tmp_path, max_steps=20, save_steps=20, lora=lora, learning_rate=rate)
    metrics = [record.values for record in records.by_kind["metrics"]]
    assert metrics[-1]["loss"] < 0.6 * metrics[0]["loss"]
    assert metrics[-1]["mean_token_accuracy"] > metrics[0]["mean_token_accuracy"]
    wanted = {"loss", "mean_token_accuracy", "entropy", "learning_rate", "grad_norm", "num_tokens", "tokens_per_second"}
    assert wanted <= metrics[0].keys()
    assert [name for name in metrics[0] if describe(name) is None] == []
    (dropped,) = [event for event in records.by_kind["event"] if event.type == "dataset.dropped"]
    assert dropped.data == {"dropped": 1, "total": 9}
    folder = tmp_path / "checkpoints" / "checkpoint-20"
    assert is_whole(folder)
    if lora:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = torch.tensor([prompt_ids(tokenizer, "3 + 1?", PromptSpec())])
    answer = model.generate(input_ids=ids, max_new_tokens=60, do_sample=False)[0, ids.shape[1] :]
    assert "The answer is" in tokenizer.decode(answer)


@pytest.mark.bitwise
def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(tiny, data_root, tmp_path):
    whole = train(tiny, data_root, tmp_path / "whole")
    part = train(tiny, data_root, tmp_path / "part", stop_after=2)  # and leaves at the end of the next step
    assert part.by_kind["result"] == []
    rest = train(tiny, data_root, tmp_path / "rest", resume_from=tmp_path / "part" / "checkpoints" / "checkpoint-3")
    again = [*part.by_kind["metrics"], *rest.by_kind["metrics"]]
    kept = ("loss", "entropy", "mean_token_accuracy", "grad_norm", "learning_rate", "num_tokens")
    assert [record.step for record in again] == [1, 2, 3, 4, 5, 6]
    for one, two in zip(whole.by_kind["metrics"], again, strict=True):
        assert [one.values[name] for name in kept] == [two.values[name] for name in kept]


def test_only_the_last_checkpoints_are_kept(tiny, data_root, tmp_path):
    train(tiny, data_root, tmp_path, save_steps=1, save_total_limit=2)
    assert list_steps(tmp_path / "checkpoints") == [5, 6]
