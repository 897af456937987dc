"""Training runs beyond the plain case: epochs, resume, precision, every weight, given adapters, layouts."""

import json
import time
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from test_families import PACKED, make
from test_trainer import DATASET, rollouts, train
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
)

from erpo_core import ERPOConfig, ERPOTrainer
from erpo_core.checkpoints import is_whole
from erpo_core.errors import DatasetError, RunError
from erpo_core.trainer import saving
from erpo_core.trainer.run import first_process_first
from erpo_core.trainer.scoring import score_rollouts
from tiny_model import make_tiny_model

SMALL_DATASET = DATASET.replace("size=16", "size=4")
COMPARED = ("loss", "reward", "entropy", "kl", "grad_norm", "learning_rate", "erpo/progress_noise")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def even_ids(completion_ids, **_):
    """A reward that a random model earns about half of the time."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def make_trainer(tiny, folder, *, reward=even_ids, model=None, peft=True, callbacks=None, **changes) -> ERPOTrainer:
    values = {
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 6,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    return ERPOTrainer(
        model=model,
        reward_funcs=reward,
        args=ERPOConfig(str(folder), **(values | changes)),
        train_dataset=Dataset.from_dict({"prompt": [f"{a}+{a}=" for a in range(16)]}),
        processing_class=AutoTokenizer.from_pretrained(tiny),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if peft is True else peft or None,
        callbacks=callbacks,
    )


def metrics_of(records) -> list[dict]:
    return [record.values for record in records.by_kind["metrics"]]


def test_golds_of_a_hub_that_are_read_as_nothing_are_refused_where_answers_are_judged(tiny, tmp_path, monkeypatch):
    rows = [{"id": f"p{n}", "problem": f"{n}+1?", "answer": answer} for n, answer in enumerate("23")]
    rows.append({"id": "odd", "problem": "?", "answer": r"\hbox{}"})
    (tmp_path / "org" / "golds").mkdir(parents=True)
    (tmp_path / "org" / "golds" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match="answer of odd") as caught:
        train(tiny, tmp_path / "judged", dataset="org/golds", max_steps=1)
    assert (caught.value.pointer, caught.value.code) == ("/dataset", "unreadable_gold")
    by_form = [{"name": "regex", "args": {"pattern": "[0-9a-f]"}}]
    assert metrics_of(train(tiny, tmp_path / "by form", dataset="org/golds", max_steps=1, rewards=by_form))


@pytest.mark.bitwise
def test_a_run_resumed_in_its_second_epoch_sees_the_same_prompts_and_numbers(tiny, tmp_path):
    settings = {"dataset": SMALL_DATASET, "max_steps": 5, "save_steps": 3, "entropy_stats": "ema"}
    whole = train(tiny, tmp_path / "whole", **settings)
    part = train(tiny, tmp_path / "part", stop_after=3, **settings)
    rest = train(tiny, tmp_path / "rest", resume_from=tmp_path / "part" / "checkpoints" / "checkpoint-3", **settings)
    again = [*part.by_kind["completions"], *rest.by_kind["completions"]]
    assert [c.rows for c in whole.by_kind["completions"]] == [c.rows for c in again]
    orders = [[row["prompt_id"] for row in c.rows] for c in whole.by_kind["completions"]]
    assert orders[0] + orders[1] != orders[2] + orders[3], "epochs differ in their order"
    for one, two in zip(metrics_of(whole), metrics_of(part) + metrics_of(rest), strict=True):
        assert [one[name] for name in COMPARED] == [two[name] for name in COMPARED]


def test_checkpoints_are_cut_between_generations_and_rotated(tiny, tmp_path):
    records = train(tiny, tmp_path, num_iterations=2, save_steps=1, max_steps=6, save_total_limit=1)
    assert [checkpoint.step for checkpoint in records.by_kind["checkpoint"]] == [2, 4, 6]
    left = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()}
    assert "checkpoint-6" in left
    assert len(left) <= 2, "the last, and the best"


@pytest.mark.parametrize(("free", "error"), [(0, RunError), (2**30, RuntimeError)])
def test_a_checkpoint_that_does_not_fit_on_the_disk_is_told_and_the_one_before_stays(
    tiny, tmp_path, monkeypatch, free, error
):
    trainer = make_trainer(tiny, tmp_path, save_strategy="steps", save_steps=1, max_steps=2)
    save_random_states = trainer._save_rng_state

    def fail_at_the_second(folder) -> None:
        if trainer.state.global_step == 2:
            raise RuntimeError("unexpected pos 40320 vs 40212")
        save_random_states(folder)

    trainer._save_rng_state = fail_at_the_second
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(error) as caught:
        trainer.train()
    assert is_whole(tmp_path / "checkpoint-1")
    if error is RunError:
        assert (caught.value.code, "step 2" in caught.value.message) == ("disk_full", True)
        assert not (tmp_path / ".saving").exists(), "what did not fit holds no space"


@pytest.mark.parametrize("moment", ["on_step_end", "on_log"])
@pytest.mark.parametrize("added", [False, True], ids=["given", "added"])
def test_who_asks_once_within_a_generation_is_heard_at_its_end(tiny, tmp_path, moment, added):
    """Whether it asks for the end or for a checkpoint, and whether or not it was there when the trainer was made."""

    def ask(self, args, state, control, **_):
        if state.global_step == 3:
            control.should_save = control.should_training_stop = True

    asking = type("Asking", (TrainerCallback,), {moment: ask})()
    changes = {"num_iterations": 2, "max_steps": 8, "callbacks": None if added else [asking]}
    trainer = make_trainer(tiny, tmp_path, **changes)
    if added:
        trainer.add_callback(asking)
    trainer.train()
    assert trainer.state.global_step == 4
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    trainer.train()
    assert trainer.state.global_step == 4, "the wish before is no wish of this training"


class Hub:
    """Remembers what is to be uploaded."""

    def __init__(self) -> None:
        self.folders = []

    def create_repo(self, *args, **_):
        return SimpleNamespace(repo_id="me/tiny")

    def upload_folder(self, *, folder_path, path_in_repo=None, **_):
        self.folders.append((path_in_repo, folder_path))
        return SimpleNamespace(done=lambda: True)


def test_a_checkpoint_is_pushed_to_a_hub_under_its_name(tiny, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda *_: hub)
    pushed = {"push_to_hub": True, "hub_model_id": "me/tiny", "hub_strategy": "checkpoint"}
    make_trainer(tiny, tmp_path, save_strategy="steps", save_steps=1, **pushed).train()
    whole = [(None, str(tmp_path)), ("last-checkpoint", str(tmp_path / "checkpoint-2"))]
    assert hub.folders == [(None, str(tmp_path)), ("last-checkpoint", str(tmp_path / "checkpoint-1")), *whole]
    assert is_whole(tmp_path / "checkpoint-2")
    assert not (tmp_path / ".saving").exists()
    assert (tmp_path / "adapter_model.safetensors").is_file(), "transformers copies it out of the checkpoint"


def test_every_weight_can_be_trained(tiny, tmp_path):
    records = train(tiny, tmp_path, lora=None, max_steps=2, learning_rate=1e-3)
    first, second = metrics_of(records)
    assert first["erpo/progress_std"] == 0
    assert first["grad_norm"] > 0
    assert second["kl"] > 0


def test_a_trained_head_gets_the_gradient_of_its_own_logits(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    batch = rollouts()
    weights = torch.linspace(-1, 1, int(batch.mask.sum()))
    (score_rollouts(model, batch, temperature=0.7).logps * weights).sum().backward()
    found = model.get_output_embeddings().weight.grad.clone()
    model.zero_grad()
    logps = []
    for row, mask in enumerate(batch.mask):
        group = row // batch.num_generations
        prompt = torch.tensor(batch.prompts[group])
        answer = batch.completion_ids[row][mask]
        logits = model(torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1] / 0.7
        logps.append(logits.log_softmax(1).gather(1, answer[:, None]).squeeze(1))
    (torch.cat(logps) * weights).sum().backward()
    torch.testing.assert_close(found, model.get_output_embeddings().weight.grad, atol=1e-4, rtol=1e-4)


def test_bf16_runs_score_in_the_dtype_that_is_asked_for(tiny, tmp_path):
    entropies = {}
    for scoring in ("float32", "auto", "bfloat16"):
        records = train(tiny, tmp_path / scoring, bf16=True, scoring_dtype=scoring, max_steps=2)
        first, second = metrics_of(records)
        assert first["erpo/progress_std"] == 0
        assert second["erpo/progress_std"] > 0
        entropies[scoring] = first["entropy"]
    assert entropies["auto"] == entropies["float32"], "on a CPU, auto is float32"
    assert entropies["bfloat16"] != entropies["float32"]


def test_autocast_does_not_reach_the_head(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval().requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = score_rollouts(model, rollouts(), temperature=1.0)
    assert scores.logps.dtype == scores.entropies.dtype == torch.float32
    assert (scores.logps != scores.logps.bfloat16().float()).any()


def move_a_frozen_weight(model) -> None:
    frozen = next(p for p in model.parameters() if not p.requires_grad)
    frozen.data.view(-1)[0] += 0.5


@pytest.mark.parametrize("peft", [True, False])
def test_a_reference_whose_weights_changed_ends_the_run(tiny, tmp_path, peft):
    trainer = make_trainer(tiny, tmp_path, peft=peft, max_steps=2, save_strategy="steps", save_steps=2)
    compute = trainer._compute_loss

    def meddle(*given):
        if trainer.state.global_step == 1:
            move_a_frozen_weight(trainer.model if peft else trainer._reference._frozen)
        return compute(*given)

    trainer._compute_loss = meddle
    with pytest.raises(RunError) as caught:
        trainer.train()
    assert caught.value.code == "base_weights_changed"
    assert not (tmp_path / "checkpoint-2").exists()


def test_a_run_does_not_go_on_from_another_base(tiny, tmp_path):
    make_trainer(tiny, tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    trainer = make_trainer(tiny, tmp_path, max_steps=2)
    move_a_frozen_weight(trainer.model)
    with pytest.raises(RunError) as caught:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert caught.value.code == "base_weights_changed"
    assert trainer.state.global_step <= 1


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_the_reference_of_a_given_adapter_is_the_adapter_it_started_from(tiny, tmp_path, beta):
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    trainer = make_trainer(tiny, tmp_path, model=get_peft_model(base, config), peft=False, beta=beta)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "kl" in entry]
    assert steps[0]["kl"] == 0
    assert steps[0]["erpo/progress_std"] == 0
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, start[name])}
    assert moved
    assert all(".default." in name for name in moved)


def test_a_script_needs_no_sink_and_keeps_only_the_last_rollouts(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, save_strategy="steps", save_steps=2, max_steps=4, trace_every=1)
    trainer.train()
    assert len(trainer.rollout_log) == 1
    assert trainer.traces == []
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    PeftModel.from_pretrained(plain, tmp_path / "checkpoint-4")


@pytest.mark.parametrize(("device", "seconds"), [("cuda", 3.0), ("cpu", 0.0)])
def test_a_phase_ends_when_the_gpu_has_done_its_work(tiny, tmp_path, monkeypatch, device, seconds):
    trainer = make_trainer(tiny, tmp_path)
    now, queued = [0.0], [2.0]
    monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: (now.append(now[-1] + sum(queued)), queued.clear()))
    monkeypatch.setattr(time, "perf_counter", lambda: now[-1])
    with trainer._timed("forward"):
        queued.append(3.0)
    monkeypatch.undo()
    assert trainer._seconds["forward"] == seconds, "the work queued before is no part of it"


def test_an_answer_that_no_function_judged_moves_nothing(tiny, tmp_path):
    def judge(completion_ids, **_):
        return [None if i % 4 == 0 else float(ids[0] % 2 == 0) for i, ids in enumerate(completion_ids)]

    trainer = make_trainer(tiny, tmp_path, reward=judge, max_steps=1, beta=0.5)
    trainer.train()
    (batch,) = trainer.rollout_log
    assert not batch.rollouts.mask[::4].any()
    assert batch.rollouts.mask[1].any()
    assert (batch.weights[:, None] * batch.rollouts.mask).sum().item() == pytest.approx(1)
    lengths = np.array([length for row, length in enumerate(batch.lengths) if row % 4])
    right = batch.rewards[~batch.rewards.isnan()].numpy() > 0
    (logs,) = (entry for entry in trainer.state.log_history if "reward" in entry)
    ratio = lengths[right].mean() / lengths[~right].mean()
    assert logs["completions/right_wrong_length_ratio"] == pytest.approx(ratio)


def test_trls_order_of_the_arguments_is_taken(tiny, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    dataset = Dataset.from_dict({"prompt": ["1+1="] * 4})
    args = ERPOConfig(str(tmp_path), num_generations=4, per_device_train_batch_size=4, use_cpu=True)
    trainer = ERPOTrainer(model, even_ids, args, dataset, None, tokenizer)
    assert trainer.train_dataset is dataset
    assert trainer.processing_class is tokenizer
    with pytest.raises(TypeError, match="train_dataset"):
        ERPOTrainer(model, even_ids, args, dataset, train_dataset=dataset)
    with pytest.raises(ValueError, match="eval_dataset"):
        ERPOTrainer(model, even_ids, args, dataset, dataset)


@pytest.mark.parametrize(("algorithm", "paper"), [("erpo", "2603.28204"), ("grpo", "2402.03300")])
def test_the_model_card_names_the_method_and_its_own_paper(tiny, tmp_path, algorithm, paper):
    make_trainer(tiny, tmp_path, algorithm=algorithm).create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert f"trained with {algorithm.upper()}, a method introduced in [" in card
    assert f"https://huggingface.co/papers/{paper})" in card
    assert ("shao2024deepseekmath" in card) == (algorithm == "grpo"), "the citation"


def weights_after(tiny, folder, **layout) -> tuple[torch.Tensor, list[str]]:
    trainer = make_trainer(
        tiny, folder, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=1e9, weight_decay=0.0, **layout
    )
    answers = []
    score = trainer._compute_loss
    trainer._compute_loss = lambda model, batch: (answers.append(batch.completions), score(model, batch))[1]
    trainer.train()
    trained = [p.detach().flatten() for n, p in trainer.model.named_parameters() if p.requires_grad]
    return torch.cat(trained), [text for batch in answers for text in batch]


@pytest.mark.parametrize("loss_type", ["erpo", "dapo", "grpo"])
def test_one_update_whatever_the_micro_batches(tiny, tmp_path, loss_type):
    whole, answers = weights_after(
        tiny, tmp_path, per_device_train_batch_size=16, gradient_accumulation_steps=1, loss_type=loss_type
    )
    for size, accumulation in ((8, 2), (4, 4), (2, 8), (1, 16)):
        again, same = weights_after(
            tiny,
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            loss_type=loss_type,
        )
        assert same == answers
        torch.testing.assert_close(whole, again, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_rates_of_dropout_that_are_no_module_of_their_own_are_off_as_well(tiny, tmp_path, family):
    """OPT drops hidden states, Qwen2 attention; gradient checkpointing wants train mode."""
    size = len(AutoTokenizer.from_pretrained(tiny))
    model = make(family, **PACKED[family], vocab_size=size, attention_dropout=0.3)
    trainer = make_trainer(tiny, tmp_path, model=model, peft=False, gradient_checkpointing=True, max_steps=1)
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "kl" in entry)
    assert first["kl/exact"] == pytest.approx(0, abs=1e-6)
    assert first["erpo/progress_std"] == pytest.approx(0, abs=1e-5)
    assert first["sampling/logp_difference_max"] < 1e-3


@pytest.mark.parametrize("option", ["gradient_checkpointing", "share"])
def test_one_update_whatever_the_path(tiny, tmp_path, option):
    plain, answers = weights_after(tiny, tmp_path)
    changed, same = weights_after(tiny, tmp_path, gradient_checkpointing=option == "gradient_checkpointing")
    assert same == answers
    torch.testing.assert_close(plain, changed, atol=1e-5, rtol=1e-5)


def no_contrast_in_the_first_group(completion_ids, **_):
    return [float(row % 2) if row >= 4 else 0.0 for row in range(len(completion_ids))]


@pytest.mark.parametrize(
    ("reward", "layout"),
    [
        pytest.param(no_contrast_in_the_first_group, {}, id="in the loss"),
        pytest.param(no_contrast_in_the_first_group, {"algorithm": "grpo"}, id="no reference"),
        pytest.param(no_contrast_in_the_first_group, {"num_iterations": 2}, id="scored before"),
        pytest.param(
            no_contrast_in_the_first_group,
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
            id="micro-batches of parts of groups",
        ),
        pytest.param(lambda completion_ids, **_: [0.0] * len(completion_ids), {}, id="every group"),
    ],
)
def test_without_a_kl_term_dead_groups_cost_no_backward_and_change_nothing(tiny, tmp_path, reward, layout):
    found = {}
    for spared in (True, False):
        trainer = make_trainer(
            tiny,
            tmp_path,
            reward=reward,
            beta=0.0,
            max_steps=2,
            progress_noise_floor=1e-6,
            optim="sgd",
            learning_rate=0.3,
            weight_decay=0.1,
            max_grad_norm=1e9,
            **layout,
        )
        if not spared:
            trainer._sparing_the_dead = lambda score, batch: score(batch.rollouts)
        with FlopCounterMode(display=False) as counter:
            trainer.train()
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
        logs = [entry for entry in trainer.state.log_history if "reward" in entry]
        found[spared] = weights, logs, counter.get_total_flops()
    (weights, logs, flops), (plain, told, more) = found[True], found[False]
    torch.testing.assert_close(weights, plain, atol=1e-6, rtol=1e-5)
    assert flops < 0.95 * more
    for one, two in zip(logs, told, strict=True):
        names = [name for name in one if not name.startswith(("time/", "step_time"))]
        values = [np.array([entry[name] for name in names], float) for entry in (one, two)]
        np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-5, err_msg=str(names))


def test_processes_wait_for_one_that_fetches_or_saves_what_is_large(monkeypatch):
    """torch's own patience is ten minutes on GPUs."""
    made = []

    class State:
        def __init__(self, **given):
            made.append(given)

        def main_process_first(self):
            return nullcontext()

    monkeypatch.setattr("accelerate.PartialState", State)
    with first_process_first():
        pass
    assert made[0]["timeout"] >= timedelta(hours=12)
