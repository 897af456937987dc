"""Evaluations while a policy is trained: when, by which numbers, and that training knows nothing of them."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_plugins import register
from test_preflight import DRAWS
from test_sft import train as imitate
from test_trainer import Records, train

pytest.importorskip("math_verify")

from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from erpo_core.checkpoints import checkpoint_folder, list_steps
from erpo_core.errors import RunError
from erpo_core.evaluation import run_evaluation
from erpo_core.job import JobInputs, ModelInput
from erpo_core.launch import launcher
from erpo_core.metric_names import benchmark_labels, describe
from erpo_core.specs import parse_spec
from erpo_core.trainer.evaluating import evaluation_spec
from erpo_core.trainer.trainer import ERPOTrainer
from tiny_model import make_tiny_model

ROOT = Path(__file__).parents[2]
SUMS = "reasoning-gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1&size=8&seed=9"
OTHERS = "reasoning-gym:chain_sum?min_terms=3&max_terms=3&min_digits=1&max_digits=1&size=3&seed=9"
EVALUATED = {"eval_every": 3, "eval_benchmarks": [SUMS, OTHERS], "eval_num_samples": 2}
TIMED = ("time/", "memory/", "tokens_per")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    rows = [{"problem": f"{a} + 1?", "answer": a + 1, "solution": f"{a} + 1 = {a + 1}."} for a in range(8)]
    (root / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


class StopAt(Records):
    """Asks to leave after so much progress in evaluations, or when it is told to."""

    def __init__(self, evaluated: int | None = None) -> None:
        super().__init__()
        self.asked, self.evaluated = False, evaluated

    @property
    def requested(self) -> bool:
        seen = sum(record.phase == "evaluate" for record in self.by_kind["progress"])
        return self.asked or (self.evaluated is not None and seen >= self.evaluated)


def evaluations(records) -> dict[int, dict]:
    """The metrics ``eval/`` by step; a step that comes twice says the same twice."""
    found: dict[int, dict] = {}
    for record in records.by_kind["metrics"]:
        values = {name: value for name, value in record.values.items() if name.startswith("eval/")}
        if values:
            assert record.step not in found
            found[record.step] = values
    return found


def plain(records) -> list[dict]:
    steps = [record.values for record in records.by_kind["metrics"] if "loss" in record.values]
    return [{name: v for name, v in values.items() if not name.startswith(TIMED) and v == v} for values in steps]


def test_the_policy_is_evaluated_before_the_first_step_every_so_many_and_after_the_last(tiny, tmp_path):
    records = train(tiny, tmp_path, **EVALUATED)
    found = evaluations(records)
    assert sorted(found) == [0, 3, 4]
    names = {"acc", "fmt", "mean_length", "truncated", "pass@2"}
    assert set(found[0]) == {f"eval/{label}/{name}" for label in ("chain_sum", "chain_sum_2") for name in names}
    assert [name for name in (*found[0], "time/evaluate") if describe(name) is None] == []
    assert describe("eval/chain_sum/loss") is None
    resolved = records.by_kind["resolved"][0].data["evaluations"]
    assert [(one["dataset"], one["num_problems"]) for one in resolved.values()] == [(SUMS, 8), (OTHERS, 3)]
    assert resolved["chain_sum"]["sampling"] == {
        **{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_completion_length": 8, "seed": 0}
    }
    last = [record for record in records.by_kind["progress"] if record.phase == "evaluate"][-1]
    assert (last.total, last.data) == (6, {"benchmark": "chain_sum_2", "step": 4})


@pytest.mark.parametrize("lora", [{"r": 4, "lora_alpha": 8}, None])
def test_the_numbers_are_those_of_an_evaluation_of_the_checkpoint(tiny, tmp_path, lora):
    changes = EVALUATED | {"eval_benchmarks": [SUMS], "eval_sampling": {"temperature": 0.7, "seed": 3}, "save_steps": 3}
    found = evaluations(train(tiny, tmp_path, lora=lora, **changes))
    training = parse_spec("train", {"model": "m", "dataset": "d", "max_completion_length": 8, **changes})
    checkpoint = tmp_path / "checkpoints" / "checkpoint-3"
    models = {0: ModelInput(str(tiny)), 3: ModelInput(str(tiny), checkpoint) if lora else ModelInput(str(checkpoint))}
    roots = (tiny.parent, tmp_path)
    for step, model in models.items():
        inputs = JobInputs("job", "run", 1, tmp_path / "work", tmp_path / "cache", model, model_roots=roots)
        records = Records()
        result = run_evaluation(evaluation_spec(training, SUMS, room=300), inputs, records, records)
        assert found[step]["eval/chain_sum/mean_length"] == result["mean_length"]["value"]
        assert found[step]["eval/chain_sum/acc"] == result["acc"]["value"]


@pytest.mark.bitwise
@pytest.mark.parametrize("algorithm", ["erpo", "grpo"])
def test_training_is_the_same_to_the_last_bit_with_and_without(tiny, tmp_path, monkeypatch, algorithm):
    """Also with a reward that draws from the global generators, as a user's may."""
    register(tmp_path / "site", monkeypatch, DRAWS, draws="own_rewards:draws")
    rewards = [{"name": "draws"}, {"name": "regex", "args": {"pattern": "[0-9a-f]"}}]
    runs = {}
    for name, changes in (("with", EVALUATED), ("without", {})):
        random.seed(5)
        np.random.seed(5)
        own = {"rewards": rewards, "outcome_reward": "regex", "algorithm": algorithm, "lora": {"r": 4}}
        runs[name] = train(tiny, tmp_path / name, **own, **changes)
    assert plain(runs["with"]) == plain(runs["without"])
    rows = [[record.rows for record in run.by_kind["completions"]] for run in runs.values()]
    assert rows[0] == rows[1]
    assert_same_weights(tmp_path)


def test_imitation_is_the_same_to_the_last_bit_with_and_without(tiny, data_root, tmp_path):
    changes = EVALUATED | {"eval_sampling": {"max_completion_length": 5}}
    runs = {"with": imitate(tiny, data_root, tmp_path / "with", **changes)}
    runs["without"] = imitate(tiny, data_root, tmp_path / "without")
    assert plain(runs["with"]) == plain(runs["without"])
    assert_same_weights(tmp_path)
    assert sorted(evaluations(runs["with"])) == [0, 3, 6]
    assert runs["with"].by_kind["resolved"][0].data["evaluations"]["chain_sum"]["sampling"]["temperature"] == 1.0


def assert_same_weights(folder: Path) -> None:
    parents = [folder / name / "checkpoints" for name in ("with", "without")]
    assert list_steps(parents[0]) == list_steps(parents[1]) != []
    for step in list_steps(parents[0]):
        one, two = (load_file(checkpoint_folder(parent, step) / "adapter_model.safetensors") for parent in parents)
        assert all((one[key] == two[key]).all() for key in one)


@pytest.mark.bitwise
def test_a_run_that_is_stopped_has_each_evaluation_once(tiny, tmp_path, monkeypatch):
    """At a step that is due: it leaves with its checkpoint, and the next attempt evaluates what that holds."""
    settings = EVALUATED | {"max_steps": 5, "save_steps": 3}
    whole = train(tiny, tmp_path / "whole", **settings)
    between = StopAt()
    training_step = ERPOTrainer.training_step

    def step_and_ask(trainer, *args):
        loss = training_step(trainer, *args)
        between.asked |= trainer.state.global_step == 2  # the third step is not over yet
        return loss

    monkeypatch.setattr(ERPOTrainer, "training_step", step_and_ask)
    for name, stop in (("between", between), ("within", StopAt(evaluated=3))):
        part = train(tiny, tmp_path / name, records=stop, **settings)
        assert part.by_kind["result"] == []
        assert sorted(evaluations(part)) == [0]
        assert part.by_kind["checkpoint"][-1].step == 3
        folder = checkpoint_folder(tmp_path / name / "checkpoints", 3)
        rest = train(tiny, tmp_path / f"{name}-rest", resume_from=folder, **settings)
        assert sorted(evaluations(rest)) == [3, 5]
        assert evaluations(part) | evaluations(rest) == evaluations(whole)
        assert plain(part) + plain(rest) == plain(whole)
    again = train(
        tiny, tmp_path / "again", resume_from=checkpoint_folder(tmp_path / "whole" / "checkpoints", 3), **settings
    )
    assert sorted(evaluations(again)) == [5], "that of step 3 had been reported before the checkpoint"


def test_a_run_that_is_stopped_before_its_first_step_leaves_at_once(tiny, tmp_path):
    records = train(tiny, tmp_path, records=StopAt(evaluated=1), **EVALUATED)
    assert [records.by_kind[kind] for kind in ("metrics", "checkpoint", "result")] == [[], [], []]


def test_a_prompt_that_leaves_no_room_fails_before_the_first_step(tiny, tmp_path):
    records = Records()
    with pytest.raises(RunError, match="chain_sum") as caught:
        train(tiny, tmp_path, records=records, **EVALUATED | {"eval_sampling": {"max_completion_length": 390}})
    assert caught.value.code == "prompt_too_long"
    assert records.by_kind["metrics"] == []


def test_ranks_share_the_answers_and_find_the_same(tiny, tmp_path):
    numbers = {}
    for num_ranks in (1, 2):
        folder = tmp_path / str(num_ranks)
        folder.mkdir()
        (folder / "tiny").symlink_to(tiny, target_is_directory=True)
        body = {"model": str(folder / "tiny"), "dataset": SUMS, "num_generations": 4, "generation_batch_size": 8}
        body |= {"max_completion_length": 6, "max_length": 400, "max_steps": 2, "preflight": False, "trace_every": 0}
        body |= {"eval_every": 2, "eval_benchmarks": [SUMS.replace("size=8", "size=70"), OTHERS]}
        body |= {"hardware": {"num_gpus": num_ranks, "strategy": "ddp"}}
        (folder / "spec.json").write_text(json.dumps(body))
        numbers[num_ranks] = run_ranks(folder, num_ranks)
    assert sorted(numbers[1]) == sorted(numbers[2])
    assert numbers[1]["0"] == numbers[2]["0"], "the base model, whoever samples"
    assert set(numbers[2]["2"]) == set(numbers[2]["0"])


def test_a_rank_without_answers_to_sample_does_not_hold_up_the_others(tiny, tmp_path):
    """FSDP2 gathers the weights of a backward by the forwards since the last one."""
    config = AutoConfig.from_pretrained(tiny, tie_word_embeddings=False)
    for part in (AutoModelForCausalLM.from_config(config), AutoTokenizer.from_pretrained(tiny)):
        part.save_pretrained(tmp_path / "tiny")
    body = {"model": str(tmp_path / "tiny"), "dataset": SUMS, "num_generations": 4, "generation_batch_size": 8}
    body |= {"max_completion_length": 6, "max_length": 400, "max_steps": 2, "preflight": False, "trace_every": 0}
    body |= {"num_iterations": 2, "lora": None, "eval_every": 1, "eval_benchmarks": [SUMS]}
    body |= {"hardware": {"num_gpus": 2, "strategy": "fsdp2"}}
    (tmp_path / "spec.json").write_text(json.dumps(body))
    assert sorted(run_ranks(tmp_path, 2, "fsdp2")) == ["0", "1", "2"]


def run_ranks(folder: Path, num_ranks: int, strategy: str = "ddp") -> dict[str, dict[str, float]]:
    command = [sys.executable, str(Path(__file__).with_name("evaluating_script.py")), str(folder)]
    if num_ranks > 1:
        command[1:1] = launcher(strategy, num_ranks)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {step: values for step, values in json.loads((folder / "evaluations.json").read_text()).items() if values}


@pytest.mark.parametrize("algorithm", ["erpo", "sft"])
def test_answers_are_no_longer_than_an_evaluation_may_ask_for(algorithm):
    spec = parse_spec("train", {"model": "m", "dataset": "d", "algorithm": algorithm, "max_length": 131_072})
    for room, longest in ((131_000, 65_536), (500, 500), (0, 1)):
        assert evaluation_spec(spec, "d", room=room).sampling.max_completion_length == longest


def test_benchmarks_of_one_name_are_told_apart():
    refs = ("math500", "math500?level=5", "data:mine.jsonl", "org/set@abc?split=test", "reasoning-gym:gcd?size=5")
    assert benchmark_labels(refs) == ["math500", "math500_2", "mine", "org/set@abc", "gcd"]
    assert len(benchmark_labels([f"data:{'x' * 190}.jsonl"])[0]) == 80
