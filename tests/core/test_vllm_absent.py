"""What asks for vLLM where it is not installed, or where it cannot follow: refused by name, with the mend."""

import importlib.util

import pytest
import torch
from accelerate import Accelerator

from erpo_core.errors import RunError
from erpo_core.generation.vllm import VLLMEngine
from erpo_core.models import load_model
from erpo_core.specs import parse_spec
from erpo_core.trainer.config import ERPOConfig
from erpo_core.trainer.sampling import make_sampler
from tiny_model import make_tiny_model


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_extra_to_install_is_named(tmp_path):
    with pytest.raises(RunError, match="install the extra `vllm`") as caught:
        VLLMEngine(tmp_path, dtype="float32", max_model_len=64)
    assert caught.value.code == "engine_unavailable"


def test_training_every_weight_with_a_vllm_server_is_refused(tmp_path):
    server = {"vllm_mode": "server", "vllm_server_base_url": "http://gpu:8000"}
    body = {"model": "smollm2-135m", "dataset": "reasoning-gym:chain_sum", "use_vllm": True, "lora": None}
    assert parse_spec("train", body).vllm_mode == "colocate"
    with pytest.raises(ValueError, match="vllm_mode: a vLLM server is sent LoRA adapters"):
        parse_spec("train", body | server)
    model, tokenizer = load_model(make_tiny_model(tmp_path / "tiny"), dtype=torch.float32)
    config = ERPOConfig(str(tmp_path), use_vllm=True, use_cpu=True, **server)
    with pytest.raises(ValueError, match="vllm_mode: a vLLM server is sent LoRA adapters"):
        make_sampler(config, model, tokenizer, Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vllm_mode", "elsewhere"),
        ("vllm_tensor_parallel_size", 2),
        ("vllm_enable_sleep_mode", True),
        ("vllm_importance_sampling_correction", True),
        ("vllm_importance_sampling_mode", "sequence_mask"),
    ],
)
def test_an_option_of_trls_vllm_that_does_nothing_here_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        ERPOConfig("out", use_cpu=True, **{name: value})
