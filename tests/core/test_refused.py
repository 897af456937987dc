"""What ERPOTrainer does not do is refused by name, with the mend."""

from types import SimpleNamespace

import pytest
from accelerate import DistributedType
from datasets import Dataset
from peft import LoraConfig
from test_trainer_runs import even_ids, make_trainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    TrainerCallback,
)

from erpo_core import ERPOConfig, ERPOTrainer
from tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def test_a_column_of_images_is_refused_by_name(tmp_path):
    for column in ("image", "images"):
        with pytest.raises(ValueError, match=f"train_dataset: column '{column}'"):
            ERPOTrainer(
                None,
                even_ids,
                ERPOConfig(str(tmp_path), use_cpu=True),
                Dataset.from_dict({"prompt": ["?"], column: [0]}),
            )


def test_a_processor_of_images_is_refused_by_name(tiny, tmp_path):
    """transformers finds one by itself where the model is one of vision and language."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = AutoModelForCausalLM.from_pretrained(tiny).config
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_id=tokenizer.vocab_size)
    )
    processor = LlavaProcessor(CLIPImageProcessor(), tokenizer, patch_size=32, vision_feature_select_strategy="default")
    dataset = Dataset.from_dict({"prompt": ["1+1="] * 16})
    args = ERPOConfig(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=r"processing_class: .* give its tokenizer"):
        ERPOTrainer(model, even_ids, args, dataset, processing_class=processor)
    ERPOTrainer(model, even_ids, args, dataset, processing_class=processor.tokenizer)


@pytest.mark.parametrize(("option", "value"), [("trainable_token_indices", [3]), ("modules_to_save", ["embed_tokens"])])
def test_what_fsdp2_cannot_shard_is_refused_by_name(tiny, tmp_path, option, value):
    trainer = make_trainer(tiny, tmp_path, peft=LoraConfig(r=4, **{option: value}))
    sharded = SimpleNamespace(distributed_type=DistributedType.FSDP)
    of_fsdp2 = SimpleNamespace(args=trainer.args, accelerator=sharded, _policy=trainer._policy)
    with pytest.raises(ValueError, match=f"{option} .*not supported with FSDP2"):
        ERPOTrainer._check_layout(of_fsdp2)


def test_dynamic_sampling_of_a_stream_is_refused_by_name(tmp_path):
    stream = Dataset.from_dict({"prompt": ["?"]}).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"dynamic_sampling: .* write False"):
        ERPOTrainer(None, even_ids, ERPOConfig(str(tmp_path), use_cpu=True, dynamic_sampling=True), stream)


def test_an_outcome_that_is_none_of_the_rewards_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="outcome_reward: 'evn_ids' is no reward function; write one of even_ids"):
        make_trainer(tiny, tmp_path, outcome_reward="evn_ids")
    assert make_trainer(tiny, tmp_path, outcome_reward="even_ids")._outcome_index() == 0
    assert make_trainer(tiny, tmp_path)._outcome_index() == 0


@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_trls_evaluation_is_refused_with_the_mend_and_disturbs_nothing(tiny, tmp_path, method):
    trainer = make_trainer(tiny, tmp_path)
    refused = []

    class Between(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            with pytest.raises(ValueError, match=r"trainer\.sample.*eval_benchmarks") as caught:
                getattr(trainer, method)(trainer.train_dataset)
            refused.append(str(caught.value).partition(":")[0])

    trainer.add_callback(Between())
    trainer.train()
    assert refused == [method, method]
    assert ["reward" in entry for entry in trainer.state.log_history if "loss" in entry] == [True, True]
