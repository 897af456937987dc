"""pi_ref is the policy that training started from, whatever adapter PEFT makes, or the kind is refused."""

import copy

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from peft.tuners.lora import KasaConfig
from test_trainer import train
from test_trainer_runs import make_trainer
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

from erpo_core.checkpoints import checkpoint_folder
from erpo_core.job import ModelInput
from tiny_model import make_tiny_model

LINEAR = {"r": 4, "target_modules": "all-linear"}
ATTENTION = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
CONFIGS = {
    "plain": LINEAR,
    "dora": LINEAR | {"use_dora": True},
    "rslora": LINEAR | {"use_rslora": True},
    "lora_bias": LINEAR | {"lora_bias": True},
    "orthogonal": LINEAR | {"init_lora_weights": "orthogonal"},
    "embeddings": {"r": 4, "target_modules": ["q_proj", "embed_tokens"]},
    "saved embeddings": LINEAR | {"modules_to_save": ["embed_tokens"]},
    "saved norms": LINEAR | {"modules_to_save": ["norm", "input_layernorm"]},
    "saved head": ATTENTION | {"modules_to_save": ["lm_head"]},
    "tokens": LINEAR | {"trainable_token_indices": [40, 50, 60, 70]},
}
SETTINGS = {"beta": 0.04, "max_grad_norm": 1e9}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def load(tiny, *, untied: bool = False):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    if untied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def trained(model):
    """Every weight of the adapter moved from where it began."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def logps_of(model, rollouts) -> torch.Tensor:
    """(N,) of the sampled tokens, each answer by the model's own forward."""
    found = []
    for row, answer in enumerate(rollouts.answers):
        prompt = rollouts.prompts[row // rollouts.num_generations]
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(1).gather(1, torch.tensor(answer)[:, None]).squeeze(1))
    return torch.cat(found)


def assert_compared_with(start, trainer) -> None:
    """Train; then the policy has moved, and what it is compared with is ``start``."""
    trainer.train()
    (batch,) = trainer.rollout_log
    expected = logps_of(start.eval(), batch.rollouts)
    torch.testing.assert_close(batch.last_scored.ref_logps[batch.rollouts.mask], expected, atol=1e-5, rtol=1e-5)
    assert (logps_of(trainer.model.eval(), batch.rollouts) - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", CONFIGS)
def test_the_reference_of_a_fresh_adapter_is_the_base(tiny, tmp_path, name):
    model = load(tiny, untied=name == "saved head")
    start = copy.deepcopy(model)
    assert_compared_with(start, make_trainer(tiny, tmp_path, model=model, peft=LoraConfig(**CONFIGS[name]), **SETTINGS))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_reference_of_a_trained_adapter_is_as_it_was_given(tiny, tmp_path, name):
    policy = trained(get_peft_model(load(tiny, untied=name == "saved head"), LoraConfig(**CONFIGS[name])))
    start = copy.deepcopy(policy)
    assert_compared_with(start, make_trainer(tiny, tmp_path, model=policy, peft=None, **SETTINGS))


@pytest.mark.parametrize("config", [None, ATTENTION | {"modules_to_save": ["lm_head"]}], ids=["whole", "saved head"])
def test_the_bias_of_the_references_head_stays_what_it_was(tiny, tmp_path, config):
    torch.manual_seed(3)
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = PhiForCausalLM(PhiConfig(**sizes, num_attention_heads=4, eos_token_id=2, initializer_range=0.2))
    start = copy.deepcopy(model)
    peft = None if config is None else LoraConfig(**config)
    assert_compared_with(start, make_trainer(tiny, tmp_path, model=model, peft=peft, **SETTINGS))
    assert (model.get_output_embeddings().bias - start.lm_head.bias).abs().max() > 1e-3


def test_a_second_training_goes_on_from_an_adapter_of_the_embeddings(tiny, tmp_path, monkeypatch):
    lora = {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}
    train(tiny, tmp_path / "first", lora=lora, max_steps=2)
    adapter = checkpoint_folder(tmp_path / "first" / "checkpoints", 2)
    monkeypatch.setattr("test_trainer.ModelInput", lambda base: ModelInput(base, adapter))
    first, second = train(tiny, tmp_path / "second", max_steps=2).by_kind["metrics"]
    assert first.values["erpo/progress_std"] == first.values["kl"] == 0
    assert second.values["erpo/progress_std"] > 0


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (LoraConfig(**LINEAR, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (LoraConfig(**LINEAR, init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'"),
        (LoraConfig(**LINEAR, init_lora_weights="olora"), "init_lora_weights='olora'"),
        (LoraConfig(**LINEAR, bias="all"), "bias='all'"),
        (LoraConfig(**LINEAR, bias="lora_only"), "bias='lora_only'"),
        (LoraConfig(**LINEAR, alora_invocation_tokens=[5]), "alora_invocation_tokens"),
        (LoraConfig(**LINEAR, kasa_config=KasaConfig()), "kasa_config"),
        (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), "IA3"),
        (AdaLoraConfig(target_modules=["q_proj"], total_step=10), "ADALORA"),
        (PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "PROMPT_TUNING"),
    ],
)
@pytest.mark.parametrize("is_given", [False, True])
def test_an_adapter_whose_reference_would_be_another_is_refused_by_name(tiny, tmp_path, config, named, is_given):
    base = load(tiny)
    model, peft = (get_peft_model(base, config), None) if is_given else (base, config)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"^peft_config: {named}.*; (write|leave)"):
        make_trainer(tiny, tmp_path, model=model, peft=peft)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_an_adapter_of_another_name_is_refused_with_what_to_write(tiny, tmp_path):
    model = get_peft_model(load(tiny), LoraConfig(**LINEAR), adapter_name="mine")
    with pytest.raises(ValueError, match="'default', not mine; load it with adapter_name='default'"):
        make_trainer(tiny, tmp_path, model=model, peft=None)


def test_an_adapter_on_the_head_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="lm_head"):
        make_trainer(tiny, tmp_path, model=load(tiny, untied=True), peft=LoraConfig(r=4, target_modules=["lm_head"]))
