"""One update from one batch, however it lies over ranks, micro-batches, generations and shards (gloo on the CPU)."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from ranks_script import answer, reward
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from erpo_core.checkpoints import is_whole
from erpo_core.launch import launcher
from tiny_model import make_tiny_model

pytestmark = pytest.mark.timeout(900)
SCRIPT = Path(__file__).with_name("ranks_script.py")
ROOT = Path(__file__).parents[2]
METRICS = (
    "reward",
    "reward_std",
    "loss",
    "grad_norm",
    "entropy",
    "entropy/p50",
    "kl",
    "kl/exact",
    "erpo/progress_std",
    "erpo/psi_std",
    "erpo/frac_dead_groups",
    "erpo/frac_silent_buckets",
    "erpo/share_flipped_wrong",
    "erpo/max_abs_advantage",
    "erpo/credit_on_top20_entropy",
    "completions/right_wrong_length_ratio",
    "verdict/right",
    "erpo/advantage_var_residual_applied",
)
LORA = {"r": 8, "lora_alpha": 16}


def an_update(name: str, layout: str, **more) -> dict:
    return {"name": name, "kind": "update", "layout": layout, **more}


def an_sft(name: str, lora: dict | None, bf16: bool = False, **hardware) -> dict:
    return {"name": name, "kind": "sft", "lora": lora, "bf16": bf16, "hardware": hardware}


TWO = {"num_gpus": 2}
DEAD = {"judged": "every other prompt", "dynamic_sampling": True}
CLIPPED = {"max_grad_norm": 0.5}
FEW = {"top_entropy_quantile": 0.2}
SIX = {"num_generations": 6, "progress_noise_floor": "auto"}
PARTED = {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}}
"""DeepSpeed leaves small parameters whole; all of the tiny model's are small."""
CASES = {
    "one": [
        an_update("adapter", "16,1,1,erpo,group"),
        an_update("adapter, ema", "16,1,1,erpo,ema"),
        an_update("every weight", "16,1,1,erpo,group", tuning="full"),
        an_update("trained adapter", "16,1,1,erpo,ema", tuning="warm"),
        an_update("untied head", "16,1,1,erpo,group", tuning="untied"),
        an_update("unjudged", "4,1,1,erpo,group", judged="half"),
        an_update("unjudged, every weight", "4,1,1,erpo,group", judged="half", tuning="full"),
        an_update("dead groups, no KL term", "16,1,1,erpo,group", judged="every other prompt", beta=0.0),
        an_update("clipped", "16,1,1,erpo,group", **CLIPPED),
        an_update("few tokens", "16,1,1,erpo,group", **FEW),
        an_update("one group", "4,1,1,erpo,group"),
        an_update("one group in two updates", "2,1,2,erpo,group"),
        an_update("dead groups", "4,1,1,erpo,group", **DEAD),
        an_update("dead groups of twelve", "12,1,1,erpo,group", **DEAD),
        an_update("groups of six", "12,1,1,erpo,group", **SIX),
        an_update("micro-batches", "2,8,8,erpo,group"),
        an_sft("sft", LORA),
        an_sft("sft, every weight", None),
    ],
    "ddp": [
        an_update("whole groups", "8,1,1,erpo,group"),
        an_update("micro-batches, ema", "4,2,2,erpo,ema"),
        an_update("groups over micro-batches", "2,4,4,erpo,group"),
        an_update("few tokens", "8,1,1,erpo,group", **FEW),
        an_update("a group over the ranks", "2,1,1,erpo,group"),
        an_update("one group in two updates", "1,1,2,erpo,group"),
        an_update("dead groups", "2,1,1,erpo,group", **DEAD),
        an_sft("sft", LORA, strategy="ddp", **TWO),
        an_sft("sft, bfloat16", LORA, bf16=True, strategy="ddp", **TWO),
        {"name": "resume in the second epoch", "kind": "resume", "steps": 9, "at": 7},
        {"name": "leave", "kind": "leave"},
    ],
    "three": [
        an_update("dead groups of twelve", "4,1,1,erpo,group", **DEAD),
        an_update("groups of six in unequal parts", "4,1,1,erpo,group", **SIX, **PARTED),
    ],
    "fsdp2": [
        an_update("whole groups", "8,1,1,erpo,group"),
        an_update("groups over micro-batches", "2,4,4,erpo,group"),
        an_update("every weight", "4,2,2,erpo,group", tuning="full", gradient_checkpointing=True),
        an_update("trained adapter", "4,2,2,erpo,ema", tuning="warm"),
        an_update("unjudged", "2,1,1,erpo,group", judged="half"),
        an_update("unjudged, every weight", "2,1,1,erpo,group", judged="half", tuning="full"),
        an_update("dead groups, no KL term", "8,1,1,erpo,group", judged="every other prompt", beta=0.0),
        {"name": "resume", "kind": "resume"},
        an_update("untied head", "4,2,2,erpo,group", tuning="untied"),
        {"name": "resume, every weight", "kind": "resume", "tuning": "full"},
        {"name": "resume, trained adapter", "kind": "resume", "tuning": "warm"},
        {"name": "leave", "kind": "leave"},
        an_sft("sft, every weight", None, strategy="fsdp2", **TWO),
    ],
    "fsdp2, layers kept whole": [
        an_update("whole groups", "8,1,1,erpo,group"),
        an_update("trained adapter", "4,2,2,erpo,ema", tuning="warm"),
    ],
    "zero2": [
        an_update("whole groups", "8,1,1,erpo,group"),
        an_update("clipped", "4,2,2,erpo,group", **CLIPPED),
        an_update("every weight", "4,2,2,erpo,group", tuning="full", gradient_checkpointing=True),
        an_update("trained adapter", "4,2,2,erpo,ema", tuning="warm"),
        an_update("unjudged", "2,1,1,erpo,group", judged="half"),
        an_update("unjudged, every weight", "2,1,1,erpo,group", judged="half", tuning="full"),
        an_update("dead groups, no KL term", "8,1,1,erpo,group", judged="every other prompt", beta=0.0),
        {"name": "resume", "kind": "resume"},
        {"name": "resume, trained adapter", "kind": "resume", "tuning": "warm"},
        {"name": "not finite", "kind": "not_finite"},
        an_sft("sft, every weight", None, strategy="zero2", **TWO),
    ],
    "zero3": [
        an_update("whole groups, the small weights whole", "8,1,1,erpo,group"),
        an_sft("sft, every weight", None, strategy="zero3", **TWO),
        an_sft("sft, bfloat16", LORA, bf16=True, strategy="zero3", **TWO),
    ],
    "zero3, parted": [
        an_update("clipped", "2,4,4,erpo,group", **CLIPPED, **PARTED),
        an_update("every weight", "4,2,2,erpo,group", tuning="full", gradient_checkpointing=True, **PARTED),
        an_update("trained adapter", "4,2,2,erpo,ema", tuning="warm", **PARTED),
        an_update("unjudged", "2,1,1,erpo,group", judged="half", **PARTED),
        an_update("unjudged, every weight", "2,1,1,erpo,group", judged="half", tuning="full", **PARTED),
        {"name": "resume", "kind": "resume", **PARTED},
        {"name": "resume, every weight", "kind": "resume", "tuning": "full", **PARTED},
        {"name": "resume, trained adapter", "kind": "resume", "tuning": "warm", **PARTED},
        {"name": "not finite", "kind": "not_finite", **PARTED},
        {"name": "leave", "kind": "leave", **PARTED},
    ],
}
"""What is run, in one launch for each strategy."""
LAUNCHERS = {
    "one": [],
    "ddp": launcher("ddp", 2),
    "three": launcher("ddp", 3),
    "fsdp2": launcher("fsdp2", 2),
    "fsdp2, layers kept whole": [*launcher("fsdp2", 2), "--fsdp_reshard_after_forward", "false"],
    "zero2": launcher("zero2", 2),
    "zero3": launcher("zero3", 2),
    "zero3, parted": launcher("ddp", 2),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    # Solutions of unequal lengths: each rank's share of a step's tokens is another.
    rows = [{"problem": f"{a} + 1?", "answer": a + 1, "solution": f"{a} + 1 = {a + 1}. " * (a + 1)} for a in range(4)]
    (root / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.fixture(scope="module")
def launched(tiny, data_root, tmp_path_factory):
    """The folder in which the cases of a strategy have left what they found."""
    done = {}

    def of(strategy: str) -> Path:
        if strategy not in done:
            done[strategy] = tmp_path_factory.mktemp(strategy)
            more = {"sft": {"data_root": str(data_root)}}
            cases = [case | more.get(case["kind"], {}) for case in CASES[strategy]]
            launch = LAUNCHERS[strategy]
            command = [sys.executable, *launch, str(SCRIPT), str(tiny), str(done[strategy]), json.dumps(cases)]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            environment["PYTHONFAULTHANDLER"] = "1"
            run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)
            assert run.returncode == 0, run.stderr[-9000:]
        return done[strategy]

    return of


def result(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict], bool]:
    found = torch.load(folder / "weights.pt", weights_only=True)
    return found["weights"], json.loads((folder / "logs.json").read_text()), found["sharded"]


@pytest.mark.parametrize(
    ("whole", "strategy", "split"),
    [
        ("adapter", "ddp", "whole groups"),
        ("adapter, ema", "ddp", "micro-batches, ema"),
        ("adapter", "ddp", "groups over micro-batches"),
        ("few tokens", "ddp", "few tokens"),
        ("adapter", "one", "micro-batches"),
        ("adapter", "fsdp2", "whole groups"),
        ("adapter", "fsdp2", "groups over micro-batches"),
        ("every weight", "fsdp2", "every weight"),
        ("trained adapter", "fsdp2", "trained adapter"),
        ("untied head", "fsdp2", "untied head"),
        ("unjudged", "fsdp2", "unjudged"),
        ("unjudged, every weight", "fsdp2", "unjudged, every weight"),
        ("dead groups, no KL term", "fsdp2", "dead groups, no KL term"),
        ("adapter", "fsdp2, layers kept whole", "whole groups"),
        ("trained adapter", "fsdp2, layers kept whole", "trained adapter"),
        ("adapter", "zero2", "whole groups"),
        ("clipped", "zero2", "clipped"),
        ("every weight", "zero2", "every weight"),
        ("trained adapter", "zero2", "trained adapter"),
        ("unjudged", "zero2", "unjudged"),
        ("unjudged, every weight", "zero2", "unjudged, every weight"),
        ("dead groups, no KL term", "zero2", "dead groups, no KL term"),
        ("adapter", "zero3", "whole groups, the small weights whole"),
        ("clipped", "zero3, parted", "clipped"),
        ("every weight", "zero3, parted", "every weight"),
        ("trained adapter", "zero3, parted", "trained adapter"),
        ("unjudged", "zero3, parted", "unjudged"),
        ("unjudged, every weight", "zero3, parted", "unjudged, every weight"),
        ("groups of six", "three", "groups of six in unequal parts"),
    ],
)
def test_one_update_whatever_the_ranks_and_the_shards(launched, tiny, whole, strategy, split):
    weights, logs, _ = result(launched("one") / whole)
    found, again, sharded = result(launched(strategy) / split)
    shards = {
        "fsdp2": "FSDP2",
        "fsdp2, layers kept whole": "FSDP2",
        "zero2": "ZeRO-2",
        "zero3": "ZeRO-3",
        "zero3, parted": "ZeRO-3",
        "three": "ZeRO-3",
    }
    assert sharded == shards.get(strategy)
    same_weights(weights, found)
    for one, two in zip(logs, again, strict=True):
        for name in METRICS:
            values = [math.nan if value is None else value for value in (one[name], two[name])]
            assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-5, nan_ok=True), name
    same_traces(launched("one") / whole, launched(strategy) / split)
    untrained = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    moved = [n for n, weight in weights.items() if n not in untrained or not torch.equal(weight, untrained[n])]
    assert moved


def same_weights(weights: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == found.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, found[name], atol=1e-5, rtol=1e-5)


def same_traces(one: Path, two: Path) -> None:
    """The first step's, the second's and the last's: every group whole, wherever its answers lie."""
    whole, parts = (json.loads((folder / "traces.json").read_text()) for folder in (one, two))
    assert {step for step, *_ in whole} == {1, 2, 3}
    for (*place, answers), (*again, found) in zip(whole, parts, strict=True):
        assert place == again
        for values, others in zip(answers, found, strict=True):
            assert values == pytest.approx(others, rel=1e-3, abs=1e-4)


def test_a_group_that_spans_the_ranks_has_the_advantages_of_the_whole_group(launched):
    weights, logs, _ = result(launched("one") / "one group")
    found, again, _ = result(launched("ddp") / "a group over the ranks")
    same_weights(weights, found)
    same_traces(launched("one") / "one group", launched("ddp") / "a group over the ranks")
    assert [entry["reward"] for entry in logs] == [entry["reward"] for entry in again]
    assert logs[2]["erpo/progress_std"] == pytest.approx(again[2]["erpo/progress_std"], rel=1e-4)


def test_each_step_tells_of_its_own_answers_on_all_ranks_and_of_their_group_once(launched):
    alone, together = (result(launched(strategy) / "one group in two updates")[1] for strategy in ("one", "ddp"))
    rewards = torch.tensor(reward([answer(ord("A"), sample) for sample in range(4)]))
    for logs, rows in ((alone, [[0, 1], [2, 3]]), (together, [[0, 2], [1, 3]])):
        assert [entry["reward"] for entry in logs[:2]] == [rewards[of_step].mean().item() for of_step in rows]
        assert [entry["erpo/group_reward_std"] for entry in logs[:2]] == pytest.approx([rewards.std().item()] * 2)
        assert [entry["erpo/frac_dead_groups"] for entry in logs[:2]] == [0, 0]


@pytest.mark.parametrize(
    ("strategy", "case"),
    [
        pytest.param("ddp", "dead groups", id="one group, which spans the ranks"),
        pytest.param("three", "dead groups of twelve", id="ranks that share the new answers unevenly"),
    ],
)
def test_dead_groups_give_way_to_the_same_prompts_on_every_rank(launched, strategy, case):
    weights, logs, _ = result(launched("one") / case)
    found, again, _ = result(launched(strategy) / case)
    same_weights(weights, found)
    assert max(entry["sampling/resample_rounds"] for entry in logs) > 0
    for one, two in zip(logs, again, strict=True):
        for name in ("reward", "sampling/resample_rounds", "sampling/skipped_prompts", "sampling/resampled_tokens"):
            assert one[name] == pytest.approx(two[name]), name
        assert one["completions/max_length"] == two["completions/max_length"]


@pytest.mark.parametrize(
    ("strategy", "case"),
    [
        ("fsdp2", "resume"),
        ("fsdp2", "resume, every weight"),
        ("fsdp2", "resume, trained adapter"),
        ("zero2", "resume"),
        ("zero2", "resume, trained adapter"),
        ("zero3, parted", "resume"),
        ("zero3, parted", "resume, every weight"),
        ("zero3, parted", "resume, trained adapter"),
    ],
)
def test_a_sharded_run_resumes_to_the_last_bit_from_files_that_are_whole(launched, tiny, strategy, case):
    weights, logs, sharded = result(launched(strategy) / case / "whole")
    again, repeated, _ = result(launched(strategy) / case / "again")
    assert sharded
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
    assert untimed(logs) == untimed(repeated)
    assert len(logs) == 6
    assert all(entry["erpo/progress_noise"] >= 0 and entry["completions/mean_length"] > 0 for entry in logs)
    checkpoint = launched(strategy) / case / "whole" / "checkpoint-6"
    assert is_whole(checkpoint)
    every = case == "resume, every weight"
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint if every else tiny)
    if not every:
        loaded = PeftModel.from_pretrained(loaded, checkpoint)
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.named_parameters())


def untimed(logs: list[dict]) -> list[dict]:
    unequal = ("time/", "memory/", "step_time", "epoch")
    return [{name: v for name, v in entry.items() if not name.startswith(unequal)} for entry in logs]


def test_ranks_that_resume_in_the_second_epoch_go_on_in_its_order(launched):
    """accelerate wraps the sampler once more for each: to skip what was read, and to part it among the ranks."""
    case = launched("ddp") / "resume in the second epoch"
    (weights, logs, _), (again, repeated, _) = (result(case / name) for name in ("whole", "again"))
    for rank in range(2):
        whole, rest = (json.loads((case / name / f"prompts-{rank}.json").read_text()) for name in ("whole", "again"))
        assert whole[7:] == rest
        assert whole[6:9] != whole[:3], "epochs differ in their order"
    assert untimed(logs) == untimed(repeated)
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3, parted"])
def test_ranks_leave_together_while_answers_grow(launched, strategy):
    folder = launched(strategy) / "leave"
    assert {path.name for path in folder.iterdir()} - {"README.md"} == {"left-0", "left-1", "checkpoint-2"}
    assert is_whole(folder / "checkpoint-2")


@pytest.mark.parametrize("strategy", ["zero2", "zero3, parted"])
def test_a_step_that_is_not_finite_is_skipped_under_zero_too(launched, strategy):
    found = json.loads((launched(strategy) / "not finite" / "found.json").read_text())
    assert found["moved"] == [True, False, True]
    assert found["skipped"] == [0, 1, 1]


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3, parted"])
def test_an_optimizer_is_saved_as_without_shards(launched, strategy):
    """Whole, in the layout of torch's own: a run may go on under another strategy."""
    state = torch.load(launched(strategy) / "resume" / "whole" / "checkpoint-3" / "optimizer.pt", weights_only=True)
    weights, _, _ = result(launched(strategy) / "resume" / "whole")
    trained = [weight for name, weight in weights.items() if "lora_" in name]
    assert [group["lr"] for group in state["param_groups"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    assert numbers == list(range(len(trained)))
    for number, weight in zip(numbers, trained, strict=True):
        assert state["state"][number]["exp_avg"].shape == weight.shape
        assert state["state"][number]["step"] == 3


@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3, parted"])
def test_an_optimizer_is_whole_in_the_memory_of_the_process_that_saves_alone(launched, strategy):
    folder = launched(strategy) / "resume" / "whole"
    weights, _, _ = result(folder)
    trained = sum(weight.numel() for name, weight in weights.items() if "lora_" in name)
    held = [json.loads((folder / f"held-{rank}.json").read_text()) for rank in (0, 1)]
    assert held == [2 * trained, 0]


@pytest.mark.parametrize(
    ("case", "strategy"),
    [("sft", "ddp"), ("sft, every weight", "fsdp2"), ("sft, every weight", "zero2"), ("sft, every weight", "zero3")],
)
def test_solutions_give_one_update_whatever_the_ranks(launched, case, strategy):
    one, two = (launched(where) / case for where in ("one", strategy))
    logs, again = (json.loads((folder / "logs.json").read_text()) for folder in (one, two))
    for step, repeated in zip(logs, again, strict=True):
        for name in ("loss", "grad_norm", "num_tokens", "mean_token_accuracy"):
            assert step[name] == pytest.approx(repeated[name], rel=1e-4, abs=1e-5), name
    name = "adapter_model.safetensors" if case == "sft" else "model.safetensors"
    files = [folder / "checkpoints" / "checkpoint-3" / name for folder in (one, two)]
    same_weights(*map(load_file, files))


def test_an_adapter_of_a_bfloat16_base_is_trained_in_float32_under_zero_too(launched):
    one, two = (launched(strategy) / "sft, bfloat16" for strategy in ("ddp", "zero3"))
    logs, again = (json.loads((folder / "logs.json").read_text()) for folder in (one, two))
    for name in ("loss", "grad_norm"):
        assert logs[0][name] == pytest.approx(again[0][name], rel=1e-3), name
        # Products are rounded otherwise, and Adam's first step has the size of the learning rate everywhere.
        assert logs[2][name] == pytest.approx(again[2][name], rel=2e-2), name
    weights = load_file(two / "checkpoints" / "checkpoint-3" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
