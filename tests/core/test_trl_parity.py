"""With A_i for every token and the same settings our step is TRL's own: the same update to rounding."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from erpo_core import ERPOConfig, ERPOTrainer
from erpo_core.generation.base import Sample
from tiny_model import make_tiny_model

G = 4
SETTINGS = {
    "num_generations": G,
    "max_completion_length": 12,
    "max_steps": 1,
    "learning_rate": 1.0,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1e9,
    "temperature": 0.9,
    "beta": 0.1,
    "epsilon": 0.2,
    "bf16": False,
    "disable_dropout": True,
    "use_bias_correction_kl": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 3,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def reward(completion_ids, **_):
    return [float(sum(ids) % 3 == 0) + 0.25 * (ids[0] % 2) for ids in completion_ids]


def answers(prompt_ids) -> list[list[int]]:
    """By the prompt and the place in its group, of unequal lengths."""
    found = []
    for row, ids in enumerate(prompt_ids):
        generator = torch.Generator().manual_seed(sum(ids) * 10 + row % G)
        length = 1 + int(torch.randint(9, (1,), generator=generator))
        found.append([*torch.randint(3, 250, (length,), generator=generator).tolist(), 2])
    return found


def engine_logps(found: list[list[int]]) -> list[list[float]]:
    """An engine that is far from the policy, so that ratios lie on both sides of both bounds."""
    return [[-5.0 + (token % 7 - 3) / 2 for token in ids] for ids in found]


class FixedTrl(GRPOTrainer):
    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        found = answers(prompt_ids)
        return found, engine_logps(found)


class FixedOurs(ERPOTrainer):
    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        found = answers(prompt_ids)
        self._samples = [Sample(ids, True, logps) for ids, logps in zip(found, engine_logps(found), strict=True)]
        return found, None


def trained(cls, config, model, tiny, **attributes) -> tuple[dict[str, torch.Tensor], dict]:
    trainer = cls(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": [f"{a}+{a}=" for a in range(12)]}),
        processing_class=AutoTokenizer.from_pretrained(tiny),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    for name, value in attributes.items():
        setattr(trainer, name, value)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = {n: p.detach() - before[n] for n, p in trainer.model.named_parameters() if p.requires_grad}
    return moved, next(entry for entry in trainer.state.log_history if "reward" in entry)


@pytest.mark.parametrize(
    ("loss_type", "micro_batch"),
    [("dapo", 8), ("grpo", 8), pytest.param("bnpo", 16, id="bnpo, which depends on what shares a micro-batch")],
)
def test_grpo_is_trls_grpo(tiny, tmp_path, loss_type, micro_batch):
    layout = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": 16 // micro_batch}
    settings = SETTINGS | layout | {"loss_type": loss_type}
    models = [AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32) for _ in range(2)]
    ours, logged = trained(FixedOurs, ERPOConfig(str(tmp_path), algorithm="grpo", **settings), models[0], tiny)
    theirs, told = trained(FixedTrl, GRPOConfig(str(tmp_path), **settings), models[1], tiny)
    assert max(change.abs().max() for change in theirs.values()) > 1e-3
    for name, change in theirs.items():
        torch.testing.assert_close(ours[name], change, atol=1e-5, rtol=1e-4)
    for name in ("reward", "reward_std", "entropy", "kl", "completions/mean_length"):
        assert logged[name] == pytest.approx(told[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_second_update_is_trls_of_the_tokens_that_are_uncertain_by_then(tiny, tmp_path, beta):
    layout = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "loss_type": "dapo", "beta": beta}
    twice = {"num_iterations": 2, "max_steps": 2, "learning_rate": 0.1, "top_entropy_quantile": 0.3}
    settings = SETTINGS | layout | twice
    models = [AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32) for _ in range(2)]
    ours, _ = trained(FixedOurs, ERPOConfig(str(tmp_path), algorithm="grpo", **settings), models[0], tiny)
    theirs, _ = trained(FixedTrl, GRPOConfig(str(tmp_path), **settings), models[1], tiny)
    for name, change in theirs.items():
        torch.testing.assert_close(ours[name], change, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask"])
def test_the_correction_for_the_engine_is_trls(tiny, tmp_path, mode):
    """TRL corrects where its own vLLM samples: it is told that it does, and given an engine's log-probabilities."""
    correction = {
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_min": 0.5,
        "vllm_importance_sampling_clip_max": 2.0,
    }
    settings = SETTINGS | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "loss_type": "dapo"}
    models = [AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32) for _ in range(3)]
    config = ERPOConfig(str(tmp_path), algorithm="grpo", use_vllm=True, **settings, **correction)
    config.use_vllm = False
    ours, logged = trained(FixedOurs, config, models[0], tiny)
    theirs, told = trained(
        FixedTrl, GRPOConfig(str(tmp_path), **settings, **correction), models[1], tiny, use_vllm=True
    )
    plain, _ = trained(FixedOurs, ERPOConfig(str(tmp_path), algorithm="grpo", **settings), models[2], tiny)
    for name, change in theirs.items():
        torch.testing.assert_close(ours[name], change, atol=1e-5, rtol=1e-4)
    assert max((change - plain[name]).abs().max() for name, change in theirs.items()) > 1e-3
    for name in ("min", "mean", "max"):
        name = f"sampling/importance_sampling_ratio/{name}"
        assert logged[name] == pytest.approx(told[name], rel=0.1 if name.endswith("mean") else 1e-4), name
    assert 0 < logged["sampling/importance_sampling_ratio/clipped"] < 1
