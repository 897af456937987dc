"""Model families: each is scored, sampled and differentiated as its own plain forward says, packed or not."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from erpo_core import packing
from erpo_core.errors import RunError
from erpo_core.generation.snapshot import PolicySnapshot
from erpo_core.generation.transformers import TransformersEngine
from erpo_core.heads import body_of, check_head
from erpo_core.packing import supports_packing
from erpo_core.trainer.scoring import pad_rollouts, score_rollouts

PROMPTS = [[5, 6, 7, 8, 9], [5, 6, 11, 12]]
ANSWERS = [[20, 21, 22, 23], [24, 25], [30, 31, 32, 33, 34, 35], [36]]
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
WINDOW = {"sliding_window": 3}
GEMMA_4 = {"global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128}
GEMMA_4 |= {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
FALCON = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2}
PACKED = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "mistral": WINDOW,
    "mixtral": EXPERTS,
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": WINDOW,
    "gemma": {},
    "olmo2": {},
    "glm4": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "starcoder2": {},
    "cohere": {"logit_scale": 0.25},
    "cohere2": WINDOW | {"logit_scale": 0.25},
    "gemma3_text": WINDOW,
    "gemma4_text": WINDOW | GEMMA_4 | {"final_logit_softcapping": 2.0},
    "ministral": WINDOW,
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3},
    "granitemoe": EXPERTS | {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 0.5},
    "nanochat": {"final_logit_softcapping": 2.0},
    "gpt_neox": {"rotary_pct": 0.25},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
}
PADDED = {
    "gemma2": WINDOW | {"final_logit_softcapping": 2.0},
    "vaultgemma": WINDOW | {"final_logit_softcapping": 2.0},
    "falcon_h1": FALCON | {"lm_head_multiplier": 0.25},
    "gpt_oss": WINDOW | EXPERTS,
    "nemotron": {},
    "qwen3_next": LINEAR | EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_5_text": LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention", "mamba"], "logits_scaling": 4.0},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False},
    "llama4_text": EXPERTS | {"intermediate_size_mlp": 48, "attention_chunk_size": 4},
}

FEW_TARGETS = ("mixtral", "llama4_text", "falcon_h1")
"""PEFT takes no router, and no product inside of Mamba."""


def make(family: str, **changes):
    sizes = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**(sizes | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def plain_logps(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """(answer, V): each row from a forward of this answer alone."""
    logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits
    return logits[0, len(prompt) - 1 : -1].float().log_softmax(1)


def of_tokens(logps: torch.Tensor, answer: list[int]) -> torch.Tensor:
    return logps.gather(1, torch.tensor(answer)[:, None])[:, 0]


class Tokenizer:
    pad_token_id = 0


@pytest.mark.parametrize("family", [*PACKED, *PADDED])
def test_scores_answers_and_gradients_are_those_of_the_models_own_forward(family):
    model = make(family, **(PACKED | PADDED)[family])
    assert supports_packing(body_of(model)) == (family in PACKED)
    targets = ["q_proj", "o_proj"] if family in FEW_TARGETS else "all-linear"
    policy = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    check_head(policy)
    pairs = [(PROMPTS[index // 2], answer) for index, answer in enumerate(ANSWERS)]

    expected = torch.cat([of_tokens(plain_logps(policy, *pair), pair[1]) for pair in pairs])
    expected.sum().backward()
    trained = [parameter for parameter in policy.parameters() if parameter.grad is not None]
    wanted = [parameter.grad.clone() for parameter in trained]
    policy.zero_grad()
    found = score_rollouts(policy, pad_rollouts(PROMPTS, ANSWERS, 0, "cpu"), temperature=1.0).logps
    found.sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for parameter, gradient in zip(trained, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-3, rtol=1e-3)

    sampled = [policy]
    if PolicySnapshot.suits(policy):
        snapshot = PolicySnapshot(policy)
        snapshot.refresh()
        sampled.append(snapshot.model)
    together = [[*range(40, 60), *prompt] for prompt in PROMPTS]
    for model in sampled:
        for prompts in (PROMPTS, together):
            call = {"n": 2, "stop_ids": [2], "temperature": 0.0, "max_new_tokens": 9}
            groups = TransformersEngine(model, Tokenizer()).generate(prompts, **call)
            for prompt, group in zip(prompts, groups, strict=True):
                for sample in group:
                    logps = plain_logps(policy, prompt, sample.token_ids)
                    assert (logps.max(1).values - of_tokens(logps, sample.token_ids)).max() < 1e-3


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_short_row_on_a_gpu_sees_as_far_as_one_in_buckets(monkeypatch, family):
    model, rollouts = make(family, **PACKED[family]), pad_rollouts(PROMPTS, ANSWERS, 0, "cpu")
    in_buckets = score_rollouts(model, rollouts, temperature=1.0).logps
    monkeypatch.setitem(packing._SHORT_ROW, "cpu", 4096)
    torch.testing.assert_close(score_rollouts(model, rollouts, temperature=1.0).logps, in_buckets, atol=1e-4, rtol=1e-4)


def test_ranks_that_share_their_weights_call_a_padded_model_once(monkeypatch):
    model, rollouts = make("qwen3_5_text", **LINEAR), pad_rollouts(PROMPTS, ANSWERS, 0, "cpu")
    calls, found = [], []
    body_of(model).register_forward_hook(lambda *_: calls.append(1))
    for in_step in (False, True):
        monkeypatch.setattr("erpo_core.trainer.scoring.goes_in_step", lambda _, in_step=in_step: in_step)
        found.append(score_rollouts(model, rollouts, temperature=1.0).logps)
        calls.append(0)
    assert calls == [1, 1, 1, 0, 1, 0]
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [3, 4096])
def test_a_model_whose_window_does_not_reach_its_attention_is_not_packed(monkeypatch, window):
    """Whatever its width: the rows that are tried are short."""
    assert supports_packing(body_of(make("mistral", sliding_window=window)))
    attend = packing._attend_buckets
    monkeypatch.setattr(packing, "_attend_buckets", lambda *given: attend(*given[:-1], None))
    model = make("mistral", sliding_window=window)
    assert not supports_packing(body_of(model))
    assert model.config.sliding_window == window


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_a_head_that_is_trained_gets_the_gradient_of_the_models_own_forward(family):
    model = make(family, **(PACKED | PADDED)[family])
    pairs = [(PROMPTS[index // 2], answer) for index, answer in enumerate(ANSWERS)]
    torch.cat([of_tokens(plain_logps(model, *pair), pair[1]) for pair in pairs]).sum().backward()
    wanted = model.get_output_embeddings().weight.grad.clone()
    model.zero_grad()
    score_rollouts(model, pad_rollouts(PROMPTS, ANSWERS, 0, "cpu"), temperature=1.0).logps.sum().backward()
    torch.testing.assert_close(model.get_output_embeddings().weight.grad, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="a CPU that computes in bfloat16")
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("family", [*PACKED, *PADDED])
def test_the_copy_of_a_bfloat16_policy_says_what_the_policy_says(family, targets):
    model = make(family, **(PACKED | PADDED)[family])
    if targets != "all-linear" and not any(name.endswith(".q_proj") for name, _ in model.named_modules()):
        targets = "all-linear"
    if family in FEW_TARGETS:
        targets = ["q_proj", "o_proj"]
    policy = get_peft_model(model.bfloat16(), LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    if not PolicySnapshot.suits(policy):
        return
    snapshot = PolicySnapshot(policy)
    snapshot.refresh()
    ids = torch.tensor([PROMPTS[0] + ANSWERS[0]])
    with torch.no_grad():
        found, exact = snapshot.model(ids).logits, policy.float()(ids).logits
    assert (found - exact).norm() < 0.1 * exact.norm()


def test_a_model_that_keeps_its_state_elsewhere_is_refused():
    with pytest.raises(RunError, match="MambaForCausalLM keeps its state") as caught:
        TransformersEngine(make("mamba"), Tokenizer()).generate(PROMPTS, stop_ids=[2], max_new_tokens=2)
    assert caught.value.code == "model_unsupported"
