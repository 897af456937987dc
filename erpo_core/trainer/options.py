"""Options of TRL and transformers that ERPO does not have: refused, since nothing would come of them.

Whatever they add is either refused here or has its effect: tests/core/test_options.py knows every name.
"""

_ELSEWHERE = "evaluate with erpo_core.evaluation"
_SAMPLER = "the sampler has temperature, top_p and top_k"
_SAMPLING = "sampling is erpo_core.generation's"
_NO_BONUS = "there is no entropy bonus in eq. 5"
_REFERENCE = "the reference is the policy that training started from"
_LOGS = "completions are in the rollout log, and in the records of a job"
_NO_LABELS = "the loss has no labels"
_ORDER = "the order of the prompts is that of seed and epoch"
_OTHER_LOSS = "it belongs to a loss that ERPO does not have"
_COMPILED = "scoring calls the decoder itself, which is not the compiled one"
_OWN_VLLM = "vLLM is started by erpo_core.generation"

REFUSED = {
    "auto_find_batch_size": "a generation batch holds whole groups",
    "average_tokens_across_devices": "eq. 5 weighs the tokens of all ranks",
    "batch_eval_metrics": _ELSEWHERE,
    "bf16_full_eval": _ELSEWHERE,
    "cache_implementation": _SAMPLING,
    "cast_lm_head_to_fp32": "logits are float32 anyway",
    "data_seed": _ORDER,
    "delta": "two-sided clipping is not part of eq. 5",
    "disable_dropout": "dropout is noise in the progress signal",
    "do_eval": _ELSEWHERE,
    "do_predict": _ELSEWHERE,
    "ds3_gather_for_generation": "weights in shards are gathered to sample",
    "entropy_coef": _NO_BONUS,
    "entropy_coef_delta": _NO_BONUS,
    "entropy_coef_max": _NO_BONUS,
    "entropy_coef_min": _NO_BONUS,
    "entropy_target": _NO_BONUS,
    "eval_accumulation_steps": _ELSEWHERE,
    "eval_delay": _ELSEWHERE,
    "eval_do_concat_batches": _ELSEWHERE,
    "eval_on_start": _ELSEWHERE,
    "eval_steps": _ELSEWHERE,
    "eval_strategy": _ELSEWHERE,
    "eval_use_gather_object": _ELSEWHERE,
    "fp16": "use bf16",
    "fp16_full_eval": _ELSEWHERE,
    "generation_kwargs": _SAMPLER,
    "greater_is_better": _ELSEWHERE,
    "importance_sampling_level": "a sequence ratio spreads token credit evenly again",
    "include_for_metrics": _ELSEWHERE,
    "include_num_input_tokens_seen": "num_active_tokens and completions/sampled_tokens are logged",
    "label_names": _NO_LABELS,
    "label_smoothing_factor": _NO_LABELS,
    "length_column_name": _ORDER,
    "liger_kernel_config": "the head is scored by erpo_core.logits",
    "load_best_model_at_end": _ELSEWHERE,
    "log_completions": _LOGS,
    "log_completions_hub_repo": _LOGS,
    "log_multimodal": _LOGS,
    "log_unique_prompts": _LOGS,
    "mask_truncated_completions": "truncated responses count as the rewards say",
    "max_tool_calling_iterations": "there are no tools",
    "metric_for_best_model": _ELSEWHERE,
    "min_p": _SAMPLER,
    "multi_objective_aggregation": "it changes eq. 3",
    "neftune_noise_alpha": "noise in the embeddings is noise in the progress signal",
    "num_completions_to_print": _LOGS,
    "num_generations_eval": _ELSEWHERE,
    "off_policy_mask_threshold": "it tests the sign of a sequence's advantage",
    "pad_to_multiple_of": "answers are packed, not padded",
    "per_device_eval_batch_size": _ELSEWHERE,
    "prediction_loss_only": _ELSEWHERE,
    "ref_model_mixup_alpha": _REFERENCE,
    "ref_model_sync_steps": _REFERENCE,
    "repetition_penalty": "the scored distribution would not be the sampled one",
    "router_aux_loss_coef": "there is no load-balancing loss in eq. 5",
    "sapo_temperature_neg": _OTHER_LOSS,
    "sapo_temperature_pos": _OTHER_LOSS,
    "scale_rewards": "ERPO's group advantage is eq. 3",
    "sync_ref_model": _REFERENCE,
    "torch_compile": _COMPILED,
    "torch_compile_backend": _COMPILED,
    "torch_compile_mode": _COMPILED,
    "train_sampling_strategy": _ORDER,
    "transformers_continuous_batching_config": _SAMPLING,
    "use_adaptive_entropy": _NO_BONUS,
    "use_bias_correction_kl": "eq. 4 has the plain k3 estimator",
    "use_liger_kernel": "the head is scored by erpo_core.logits",
    "use_transformers_continuous_batching": _SAMPLING,
    "use_transformers_paged": _SAMPLING,
    "vespo_k_neg": _OTHER_LOSS,
    "vespo_k_pos": _OTHER_LOSS,
    "vespo_lambda_neg": _OTHER_LOSS,
    "vespo_lambda_pos": _OTHER_LOSS,
    "vllm_enable_sleep_mode": "vLLM keeps its share of the memory",
    "vllm_group_port": "a vLLM server is sent adapters by its own address",
    "vllm_model_impl": _OWN_VLLM,
    "vllm_structured_outputs_regex": "the scored distribution would not be the sampled one",
    "vllm_tensor_parallel_size": "vLLM shares the trainer's device",
}
"""{option: why}. Each has a default that is the only value it may have, but for :data:`SAME_AS_DEFAULT`."""

SAME_AS_DEFAULT = {
    "include_num_input_tokens_seen": False,
    "pad_to_multiple_of": None,
    "router_aux_loss_coef": 0.0,
    "scale_rewards": True,
}
"""Another way to write the default: a user's, or what TRL and its parser make of it."""
