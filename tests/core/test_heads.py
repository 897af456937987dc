"""What lies between hidden states and logits: known options are followed, and what is not known is refused."""

import pytest
import torch
from datasets import Dataset
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from erpo_core import ERPOConfig, ERPOTrainer
from erpo_core.heads import check_head, check_training_mode, logit_form
from erpo_core.logits import LogitForm
from tiny_model import make_tiny_model, make_tiny_tokenizer

FORMS = {
    "llama": ({}, LogitForm()),
    "cohere": ({}, LogitForm(scale=0.0625)),
    "falcon_h1": ({"lm_head_multiplier": 0.25}, LogitForm(scale=0.25)),
    "gemma2": ({}, LogitForm(cap=30.0)),
    "gemma3_text": ({"final_logit_softcapping": 1.0}, LogitForm(cap=1.0)),
    "gemma4": ({"text_config": {"final_logit_softcapping": 30.0}}, LogitForm(cap=30.0)),
    "granite": ({"logits_scaling": 8.0}, LogitForm(scale=0.125)),
    "hyperclovax": ({"logits_scaling": 8.0}, LogitForm(scale=8.0)),
    "recurrent_gemma": ({}, LogitForm(cap=30.0)),
}


@pytest.mark.parametrize("family", FORMS)
def test_the_configuration_says_what_becomes_of_the_heads_products(family):
    changes, form = FORMS[family]
    assert logit_form(CONFIG_MAPPING[family](**changes)) == form


def trainer_of(model, folder, **settings) -> ERPOTrainer:
    return ERPOTrainer(
        model,
        lambda completions, **_: [0.0] * len(completions),
        ERPOConfig(str(folder), use_cpu=True, **settings),
        train_dataset=Dataset.from_dict({"prompt": ["1+1="]}),
        processing_class=make_tiny_tokenizer(),
    )


class Louder(torch.nn.Linear):
    """A head whose product is not its weight's."""

    def forward(self, states):
        return 1.5 * super().forward(states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_logits_are_changed_otherwise_is_refused_before_anything_is_sampled(tmp_path, dtype):
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "tiny"), dtype=dtype)
    check_head(model)
    louder = Louder(*reversed(model.lm_head.weight.shape), bias=False, dtype=dtype)
    louder.weight = model.lm_head.weight
    model.lm_head = louder
    del model._has_known_logits
    with pytest.raises(ValueError, match=r"model: .* changes its logits after the head in a way that is not known"):
        trainer_of(model, tmp_path)


def test_a_model_that_draws_in_training_mode_is_refused_with_gradient_checkpointing(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "tiny"))
    check_training_mode(model)
    model.model.norm.register_forward_hook(
        lambda norm, _, states: states + torch.randn_like(states) if norm.training else states
    )
    trainer_of(model, tmp_path, gradient_checkpointing=False)
    with pytest.raises(ValueError, match=r"gradient_checkpointing: .* write False"):
        trainer_of(model, tmp_path, gradient_checkpointing=True)
