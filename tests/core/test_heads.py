"""Models whose logits are not their head's weight times their hidden states are refused: scores would be wrong."""

import pytest
from datasets import Dataset
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from erpo_core import ERPOConfig, ERPOTrainer
from erpo_core.trainer.scoring import check_head
from tiny_model import make_tiny_tokenizer

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GEMMA_4 = SMALL | {"global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64}
GEMMA_4 |= {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]}
CHANGED = {
    "cohere": ("logit_scale", {}),
    "falcon_h1": ("lm_head_multiplier", {"lm_head_multiplier": 0.25}),
    "gemma2": ("final_logit_softcapping", {}),
    "gemma3_text": ("final_logit_softcapping", {"final_logit_softcapping": 1.0}),
    "gemma3n": ("final_logit_softcapping", {}),
    "gemma4": ("final_logit_softcapping", {"text_config": {"final_logit_softcapping": 30.0}}),
    "granite": ("logits_scaling", {"logits_scaling": 8.0}),
    "minicpm3": ("logits_scaling", {}),
    "muse_glimmer": ("final_logit_softcapping", {}),
    "recurrent_gemma": ("logits_soft_cap", {}),
    "xlstm": ("output_logit_soft_cap", {}),
}


@pytest.mark.parametrize("family", CHANGED)
def test_a_family_that_changes_its_logits_after_the_head_is_refused_by_name(family):
    name, changes = CHANGED[family]
    with pytest.raises(ValueError, match=f"after the head \\({name}\\)"):
        check_head(CONFIG_MAPPING[family](**changes))


def test_a_model_whose_text_part_caps_its_logits_is_refused_before_anything_is_sampled(tmp_path):
    text = GEMMA_4 | {"final_logit_softcapping": 1.0}
    config = CONFIG_MAPPING["gemma4"](text_config=text, vision_config=None, audio_config=None)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        ERPOTrainer(
            model,
            lambda completions, **_: [0.0] * len(completions),
            ERPOConfig(str(tmp_path), use_cpu=True),
            train_dataset=Dataset.from_dict({"prompt": ["1+1="]}),
            processing_class=make_tiny_tokenizer(),
        )
