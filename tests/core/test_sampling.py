"""What a job has put elsewhere to sample, it takes back: adapters on a vLLM server, and their folders."""

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from test_preflight import BOXED_ONLY
from test_trainer import train
from transformers import AutoModelForCausalLM

from erpo_core.errors import RunError
from erpo_core.models import load_tokenizer
from erpo_core.trainer.config import ERPOConfig
from erpo_core.trainer.sampling import TransformersSampler, make_sampler
from erpo_core.trainer.vllm_sampling import ServerSampler
from tiny_model import make_tiny_model

PROBE = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def policy(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


class Server:
    """Serves what it has read."""

    max_model_len = 100

    def __init__(self, policy) -> None:
        self._policy = policy
        self.held: set[str] = set()
        self.is_gone = False

    def load_adapter(self, folder, name) -> None:
        assert (folder / "adapter_model.safetensors").exists()
        self.held.add(name)

    def use_adapter(self, name) -> None:
        assert name in self.held

    def unload_adapter(self, name) -> None:
        if self.is_gone:
            raise RunError("does not answer", code="engine_unavailable")
        self.held.discard(name)

    def prompt_logps(self, ids):
        with torch.no_grad():
            logps = self._policy(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return logps.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1).tolist()


def test_a_server_forgets_the_last_adapter_and_its_folder_goes(policy, tmp_path):
    server, folder = Server(policy), tmp_path / ".vllm-adapters"
    sampler = ServerSampler(server, folder, Accelerator(cpu=True), PROBE)
    sampler.close()
    sampler(policy)
    (first,) = server.held
    assert folder.exists()
    sampler.close()
    assert server.held == set()
    assert not folder.exists()
    sampler(policy)
    assert len(server.held) == 1
    assert first not in server.held, "vLLM knows an adapter by its name"
    server.is_gone = True
    sampler.close()
    assert not folder.exists()


def test_a_server_that_does_not_take_a_version_forgets_the_one_before(policy, tmp_path, monkeypatch):
    server = Server(policy)
    sampler = ServerSampler(server, tmp_path / "adapters", Accelerator(cpu=True), PROBE)
    sampler(policy)
    sampler._sent = None

    def refuse(*_):
        raise RunError("no room", code="engine_unavailable")

    monkeypatch.setattr(server, "load_adapter", refuse)
    with pytest.raises(RunError, match="no room"):
        sampler(policy)
    assert len(server.held) == 1
    sampler.close()
    assert server.held == set()


@pytest.mark.parametrize(
    "more", [{"alpha_pattern": {"q_proj": 32}}, {"rank_pattern": {"q_proj": 2}}, {"lora_bias": True}]
)
def test_an_adapter_of_which_vllm_would_leave_out_something_is_refused(tiny, tmp_path, more):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    policy = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], **more))
    args = ERPOConfig(str(tmp_path), use_vllm=True, use_cpu=True)
    with pytest.raises(ValueError, match=f"use_vllm.*{next(iter(more))}"):
        make_sampler(args, policy, load_tokenizer(tiny), Accelerator(cpu=True))


def test_a_training_gives_back_at_its_end_whatever_the_end_is(tiny, tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(TransformersSampler, "close", lambda sampler: closed.append(sampler))
    train(tiny, tmp_path / "whole", max_steps=1)
    assert len(closed) == 1
    with pytest.raises(RunError, match="nothing can be learnt"):
        train(tiny, tmp_path / "failed", preflight=True, **BOXED_ONLY)
    assert len(closed) == 2
