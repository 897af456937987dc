"""Options that would do nothing are refused by name, whatever they come from: TRL, transformers, PEFT or the API."""

from dataclasses import MISSING, fields, replace

import pytest
from peft import LoraConfig
from trl import GRPOConfig, TrlParser

from erpo_core.specs import parse_spec
from erpo_core.trainer.config import ERPOConfig
from erpo_core.trainer.options import REFUSED, SAME_AS_DEFAULT
from erpo_core.trainer.run import wants_bf16
from erpo_core.trainer.trainer import ERPOTrainer

READ = """
accelerator_config adam_beta1 adam_beta2 adam_epsilon beta bf16 chat_template_kwargs dataloader_drop_last
dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers
dataloader_pin_memory dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb
ddp_find_unused_parameters ddp_static_graph ddp_timeout debug deepspeed disable_tqdm enable_jit_checkpoint epsilon
epsilon_high fsdp fsdp_config full_determinism generation_batch_size gradient_accumulation_steps
gradient_checkpointing gradient_checkpointing_kwargs hub_always_push hub_model_id hub_private_repo hub_revision
hub_strategy hub_token ignore_data_skip learning_rate log_level log_level_replica log_on_each_node
logging_first_step logging_nan_inf_filter logging_steps logging_strategy loss_type lr_scheduler_kwargs
lr_scheduler_type max_completion_length max_grad_norm max_steps model_init_kwargs num_generations num_iterations
num_train_epochs optim optim_args optim_target_modules output_dir parallelism_config per_device_train_batch_size
project push_to_hub remove_unused_columns report_to restore_callback_states_from_checkpoint reward_weights run_name
save_on_each_node save_only_model save_steps save_strategy save_total_limit seed shuffle_dataset
skip_memory_metrics steps_per_generation temperature tf32 top_entropy_quantile top_k top_p torch_empty_cache_steps
trackio_bucket_id trackio_space_id trackio_static_space_id trust_remote_code use_cache use_cpu use_vllm
vllm_gpu_memory_utilization vllm_importance_sampling_cap vllm_importance_sampling_clip_max
vllm_importance_sampling_clip_min vllm_importance_sampling_correction vllm_importance_sampling_mode
vllm_max_model_length vllm_mode vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout
warmup_steps weight_decay
do_train local_rank resume_from_checkpoint
""".split()  # noqa: SIM905
"""Options with the effect that TRL and transformers say; the last ones are for whoever starts a trainer."""


def test_every_inherited_option_is_read_or_refused():
    """Fails where TRL or transformers add one: find out whether it has an effect, and put it into a table."""
    inherited = {option.name for option in fields(GRPOConfig)}
    assert inherited == {*READ, *REFUSED}
    assert len(inherited) == len(READ) + len(REFUSED), "in one table alone"


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_an_option_without_effect_is_refused_unless_it_is_at_its_default(tmp_path, name):
    (option,) = (option for option in fields(ERPOConfig) if option.name == name)
    default = option.default_factory() if option.default is MISSING else option.default
    ERPOConfig(str(tmp_path), use_cpu=True, **{name: default})
    other = (not default) if isinstance(default, bool) else 7 if isinstance(default, int | float) else "another"
    with pytest.raises(ValueError, match=rf"^{name}: {other!r} is not supported by ERPO \(.*leave it at"):
        ERPOConfig(str(tmp_path), use_cpu=True, **{name: other})
    if name in SAME_AS_DEFAULT:
        ERPOConfig(str(tmp_path), use_cpu=True, **{name: SAME_AS_DEFAULT[name]})


def test_a_configuration_goes_through_trls_parser_and_through_replace(tmp_path):
    given = ["--output_dir", str(tmp_path), "--use_cpu", "true"]
    (parsed,) = TrlParser(ERPOConfig).parse_args_and_config([*given, "--progress_noise_floor", "0.01"])
    assert parsed.progress_noise_floor == 0.01
    (parsed,) = TrlParser(ERPOConfig).parse_args_and_config(given)
    assert parsed.progress_noise_floor == "auto"
    changed = replace(parsed, learning_rate=1e-4, generation_batch_size=None)
    assert (changed.learning_rate, changed.loss_type) == (1e-4, "erpo")


def test_dropout_which_scoring_leaves_out_is_refused(tmp_path):
    peft_config = LoraConfig(r=4, lora_dropout=0.1, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="peft_config: lora_dropout"):
        ERPOTrainer(None, None, ERPOConfig(str(tmp_path), use_cpu=True), peft_config=peft_config)
    body = {"model": "m", "dataset": "d", "lora": {"lora_dropout": 0.1}}
    for algorithm in ("erpo", "grpo"):
        with pytest.raises(ValueError, match="lora/lora_dropout: "):
            parse_spec("train", body | {"algorithm": algorithm})
    assert parse_spec("train", body | {"algorithm": "sft"}).lora.lora_dropout == 0.1


def test_scoring_in_bfloat16_is_in_bfloat16_or_refused(tmp_path):
    body = {"model": "m", "dataset": "d", "scoring_dtype": "bfloat16"}
    assert wants_bf16(parse_spec("train", body))
    with pytest.raises(ValueError, match="scoring_dtype: "):
        parse_spec("train", body | {"bf16": False})
