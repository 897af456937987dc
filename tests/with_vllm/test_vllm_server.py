"""A real `vllm serve` on SmolLM2: answers, adapters by name, and a training that follows it."""

import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_vllm_engine import QUESTIONS, ids, score
from test_vllm_training import trained

from erpo_core.errors import RunError
from erpo_core.generation.transformers import TransformersEngine
from erpo_core.generation.vllm_server import VLLMServer
from erpo_core.models import load_model, load_policy
from erpo_core.prompts import stop_token_ids
from erpo_core.records import Metrics
from erpo_core.rewards.functions import Regex

pytestmark = pytest.mark.timeout(900)
SETTINGS = ["--dtype", "float32", "--max-model-len", "400", "--max-num-seqs", "8", "--enforce-eager"]
LORA = ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"]


@pytest.fixture(scope="module")
def url(smollm2, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    # `vllm serve` itself asks for the version of a package `vllm`, which is not what `vllm-cpu` is called.
    script = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2), "--port", str(port)]
    with (tmp_path_factory.mktemp("server") / "log").open("w") as log:
        process = subprocess.Popen(
            [*script, "--host", "127.0.0.1", *SETTINGS, *LORA],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        yield f"http://127.0.0.1:{port}"
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="module")
def server(url):
    server = VLLMServer(url, logps=True, timeout=600)
    yield server
    server.close()


@pytest.fixture(scope="module")
def loaded(smollm2):
    return load_model(smollm2, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(loaded):
    turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [loaded[1].apply_chat_template(turn, add_generation_prompt=True, return_dict=False) for turn in turns]


@pytest.fixture(scope="module")
def adapter(smollm2, tmp_path_factory):
    torch.manual_seed(1)
    config = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(load_model(smollm2, dtype=torch.float32)[0], config).save_pretrained(folder)
    return folder


def ask(server, loaded, prompts, **more):
    settings = {"n": 2, "max_new_tokens": 12, "stop_ids": stop_token_ids(loaded[1], loaded[0]), "seed": 7}
    return server.generate(prompts, **settings | more)


def test_answers_are_those_of_the_model_and_follow_the_seed(server, loaded, prompts):
    stops = stop_token_ids(loaded[1], loaded[0])
    greedy = TransformersEngine(*loaded).generate(prompts, temperature=0, max_new_tokens=12, stop_ids=stops)
    assert ids(ask(server, loaded, prompts, temperature=0)) == [[group[0].token_ids] * 2 for group in greedy]
    first = ask(server, loaded, prompts)
    assert ids(ask(server, loaded, prompts)) == ids(first)
    assert ids(ask(server, loaded, prompts, seed=8)) != ids(first)
    for ours, sample in zip(
        score(loaded[0], prompts, first, 1.0), [sample for group in first for sample in group], strict=True
    ):
        torch.testing.assert_close(ours, torch.tensor(sample.logps), atol=2e-4, rtol=1e-4)
        assert sample.finished == (sample.token_ids[-1] in stops)
    assert ask(server, loaded, prompts, temperature=0.7)[0][0].logps is None


def test_an_adapter_is_used_by_its_name_and_the_base_in_between(server, loaded, prompts, adapter, smollm2):
    base = ids(ask(server, loaded, prompts))
    server.load_adapter(adapter, "one")
    server.use_adapter("one")
    changed = ids(ask(server, loaded, prompts))
    model = PeftModel.from_pretrained(load_model(smollm2, dtype=torch.float32)[0], adapter)
    text = prompts[2]
    theirs = torch.tensor(server.prompt_logps(text))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([text])).logits[0, :-1]
    ours = logits.log_softmax(-1).gather(1, torch.tensor(text[1:])[:, None]).squeeze(1)
    torch.testing.assert_close(theirs, ours, atol=2e-4, rtol=1e-4)
    server.use_adapter(None)
    assert ids(ask(server, loaded, prompts)) == base != changed
    server.unload_adapter("one")
    server.unload_adapter("one")


def test_an_adapter_that_the_server_cannot_take_is_refused(server, smollm2, tmp_path):
    with pytest.raises(RunError, match="see that folder") as caught:
        server.load_adapter(tmp_path / "nowhere", "nowhere")
    assert caught.value.code == "adapter_unsupported"
    config = LoraConfig(r=16, target_modules="all-linear")
    get_peft_model(load_model(smollm2, dtype=torch.float32)[0], config).save_pretrained(tmp_path / "wide")
    with pytest.raises(RunError, match="max-lora-rank"):
        server.load_adapter(tmp_path / "wide", "wide")


@pytest.fixture
def train(url, smollm2, tmp_path):
    """A training of two steps that samples from the server; its records."""

    def train(**changes):
        body = {
            "model": str(smollm2),
            "dataset": "reasoning-gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1&size=8&seed=3",
            "rewards": [{"name": "regex", "args": {"pattern": "[a-m]"}}, {"name": "length_penalty", "args": PENALTY}],
            "num_generations": 2,
            "generation_batch_size": 4,
            "max_completion_length": 8,
            "max_length": 300,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "preflight": False,
            "lora": {"r": 4, "lora_alpha": 8},
            "use_vllm": True,
            "vllm_mode": "server",
            "vllm_server_base_url": url,
        }
        return trained(smollm2, tmp_path, body | changes)

    return train


PENALTY = {"max_completion_len": 8, "soft_punish_cache": 8}


def test_the_server_samples_from_the_policy_of_each_step(server, train, monkeypatch):
    names = []
    use = VLLMServer.use_adapter
    monkeypatch.setattr(VLLMServer, "use_adapter", lambda self, name: (names.append(name), use(self, name)))
    steps = [record.values for record in train() if isinstance(record, Metrics) and "reward" in record.values]
    assert len(steps) == len(set(names)) == 2
    for values in steps:
        assert 0 < values["sampling/logp_difference_mean"] <= values["sampling/logp_difference_max"] < 1e-2
    left = [card["id"] for card in server._client.get("/v1/models").json()["data"]]
    assert not {*names} & {*left}, "the last one too is forgotten"


def test_a_step_on_the_adapter_of_the_step_before_is_refused(server, train, tmp_path, monkeypatch):
    load, first = VLLMServer.load_adapter, tmp_path / "first"

    def load_the_first(self, folder, name) -> None:
        if not first.exists():
            shutil.copytree(folder, first)
        load(self, first, name)

    def every_other(self, *, completions, **_) -> list[float]:
        return [float(row % 2) for row in range(len(completions))]

    # Whatever the server samples, the first step moves the policy, and far enough to be seen above the rounding.
    monkeypatch.setattr(Regex, "__call__", every_other)
    monkeypatch.setattr(VLLMServer, "load_adapter", load_the_first)
    with pytest.raises(RunError, match="not as version 2") as caught:
        train(learning_rate=5e-3)
    assert caught.value.code == "stale_adapter"


def test_a_server_of_another_base_model_is_refused(server, train, monkeypatch):
    def load_another(*args, **kwargs):
        model, *rest = load_policy(*args, **kwargs)
        model.model.norm.weight.data *= 0.5
        return model, *rest

    monkeypatch.setattr("erpo_core.trainer.run.load_policy", load_another)
    with pytest.raises(RunError, match="another base model") as caught:
        train()
    assert caught.value.code == "stale_adapter"
