"""vLLM's engine on SmolLM2: answers, seeds, log-probabilities, adapters."""

import random
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from erpo_core.errors import RunError
from erpo_core.generation.adapters import digest_of, scaled_pairs
from erpo_core.generation.transformers import TransformersEngine
from erpo_core.generation.vllm import VLLMEngine
from erpo_core.job import LeftEarlyError
from erpo_core.models import load_model
from erpo_core.prompts import stop_token_ids
from erpo_core.trainer.scoring import pad_rollouts, score_rollouts

pytestmark = pytest.mark.timeout(300)
QUESTIONS = ("What is 4 + 3?", "Name a colour. One word only.", "Why is the sky blue?")


@pytest.fixture(scope="module")
def loaded(smollm2):
    """Model and tokenizer in transformers."""
    return load_model(smollm2, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(loaded):
    turns = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [loaded[1].apply_chat_template(turn, add_generation_prompt=True, return_dict=False) for turn in turns]


@pytest.fixture(scope="module")
def adapters(smollm2, tmp_path_factory):
    """Two adapters of random weights, with the model that carries them."""
    folders = []
    for seed, alpha in ((1, 8), (2, 12)):
        model, _ = load_model(smollm2, dtype=torch.float32)
        torch.manual_seed(seed)
        config = LoraConfig(r=8, lora_alpha=alpha, target_modules="all-linear", init_lora_weights=False)
        folder = tmp_path_factory.mktemp("adapter")
        get_peft_model(model, config).save_pretrained(folder)
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def engine(smollm2):
    engine = VLLMEngine(smollm2, dtype="float32", max_model_len=256, max_num_seqs=16, max_lora_rank=8, logps=True)
    yield engine
    engine.close()


@pytest.fixture
def ask(engine, loaded, prompts):
    """Answers of 12 tokens at most, as token ids; more settings override."""

    def ask(**more):
        engine.drop_adapter()
        if folder := more.pop("adapter", None):
            engine.load_adapter(folder)
        settings = {"n": 2, "max_new_tokens": 12, "stop_ids": stop_token_ids(loaded[1], loaded[0]), "seed": 7}
        return engine.generate(prompts, **settings | more)

    return ask


def ids(groups) -> list[list[list[int]]]:
    return [[sample.token_ids for sample in group] for group in groups]


def test_the_same_seed_gives_the_same_answers_and_another_seed_gives_others(ask):
    first = ids(ask())
    ask(seed=8)
    assert ids(ask()) == first
    assert ids(ask(seed=8)) != first
    assert first[2][0] != first[2][1]


def test_where_requests_have_seeds_no_two_answers_share_one():
    engine = object.__new__(VLLMEngine)
    engine._on_cuda, engine.max_model_len, engine._logps = True, 64, False
    calls = [engine._call([[1, 2], [1, 2], [3]], 8, 1.0, 1.0, 0, 8, [0], seed) for seed in (7, 8)]
    seeds = [params.seed + j for call in calls for _, params in call.requests for j in range(8)]
    assert len(set(seeds)) == 2 * 3 * 8


def test_the_generators_of_the_process_are_left_as_they_were(ask):
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    ask()
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_greedy_answers_are_those_of_transformers(ask, loaded, prompts):
    stops = stop_token_ids(loaded[1], loaded[0])
    expected = TransformersEngine(*loaded).generate(prompts, temperature=0, max_new_tokens=12, stop_ids=stops)
    found = ask(temperature=0)
    assert ids(found) == [[group[0].token_ids] * 2 for group in expected]
    assert found[0][0].logps is None


def test_calls_are_answered_in_order_while_the_next_one_has_begun(engine, ask, loaded, prompts, monkeypatch):
    expected = ids(ask(temperature=0))
    monkeypatch.setattr(engine, "_overlaps", True)
    asked = []

    def calls():
        for prompt in prompts:
            asked.append(prompt)
            settings = {"n": 2, "temperature": 0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 12, "seed": 7}
            yield settings | {"prompts": [prompt], "stop_ids": stop_token_ids(loaded[1], loaded[0])}

    answers = engine.generate_each(calls())
    assert ids([*next(answers)]) == expected[:1]
    assert len(asked) == 3
    assert [ids(groups) for groups in answers] == [[group] for group in expected[1:]]


def test_a_job_that_is_asked_to_leave_gives_its_answers_up_at_once(engine, ask):
    whole = ids(ask())
    told = []

    def watch(tokens, ended):
        told.append(ended)
        if len(told) == 3:
            raise LeftEarlyError

    engine.watch = watch
    try:
        with pytest.raises(LeftEarlyError):
            ask(max_new_tokens=200, stop_ids=[])
    finally:
        engine.watch = None
    assert told == [0, 0, 0]
    assert ids(ask()) == whole, "what was given up is in no later batch"


def test_an_answer_ends_with_any_of_the_stop_tokens_and_with_nothing_else(ask, loaded, prompts):
    whole = ask(temperature=0, max_new_tokens=20, stop_ids=[])[0][0]
    assert not whole.finished
    assert len(whole.token_ids) == 20
    end = loaded[1].eos_token_id
    assert end in whole.token_ids[:-1], "the model's own end does not end an answer that is not to stop there"
    stop = whole.token_ids[2]
    cut = ask(temperature=0, max_new_tokens=20, stop_ids=[stop, end])[0][0]
    assert cut.finished
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]


def score(model, prompts, groups, temperature):
    """The trainer's log-probabilities of the same tokens."""
    answers = [sample.token_ids for group in groups for sample in group]
    rollouts = pad_rollouts(prompts, answers, 0, "cpu")
    with torch.no_grad():
        logps = score_rollouts(model, rollouts, temperature=temperature).logps
    return torch.split(logps, [len(answer) for answer in answers])


@pytest.mark.parametrize("adapter", [None, 1], ids=["base", "adapter"])
def test_log_probs_are_those_that_the_trainer_computes(ask, loaded, prompts, adapters, adapter, smollm2):
    model = loaded[0]
    if adapter is not None:
        model = PeftModel.from_pretrained(load_model(smollm2, dtype=torch.float32)[0], adapters[adapter])
    groups = ask(temperature=0.7, adapter=None if adapter is None else adapters[adapter])
    found = [torch.tensor(sample.logps) for group in groups for sample in group]
    for ours, theirs in zip(score(model, prompts, groups, 0.7), found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_adapters_change_the_answers_and_the_base_answers_as_before_in_between(ask, adapters):
    base, first, second = ids(ask()), ids(ask(adapter=adapters[0])), ids(ask(adapter=adapters[1]))
    assert base != first != second != base
    assert ids(ask()) == base
    assert ids(ask(adapter=adapters[0])) == first


def test_the_engine_says_which_adapter_it_holds(engine, smollm2, adapters):
    for folder in adapters:
        model = PeftModel.from_pretrained(load_model(smollm2, dtype=torch.float32)[0], folder)
        layers = [m for m in model.modules() if hasattr(m, "lora_A") and "default" in m.lora_A]
        pairs = [(m.lora_A["default"].weight, m.lora_B["default"].weight, m.scaling["default"]) for m in layers]
        engine.load_adapter(folder)
        assert engine.adapter_digest() == digest_of(scaled_pairs(pairs, torch.float32))
        with torch.no_grad():
            pairs[3][1][0, 0] += 1e-6
        assert engine.adapter_digest() != digest_of(scaled_pairs(pairs, torch.float32))
    engine.drop_adapter()
    assert engine.adapter_digest() is None


def test_an_adapter_that_vllm_cannot_serve_is_refused(engine, smollm2, tmp_path):
    model, _ = load_model(smollm2, dtype=torch.float32)
    config = LoraConfig(r=8, target_modules="all-linear", use_dora=True)
    get_peft_model(model, config).save_pretrained(tmp_path / "dora")
    with pytest.raises(RunError, match="DoRA") as caught:
        engine.load_adapter(tmp_path / "dora")
    assert caught.value.code == "adapter_unsupported"


def test_an_adapter_whose_modules_the_model_has_under_other_names_is_refused(engine, adapters, tmp_path):
    weights = load_file(adapters[0] / "adapter_model.safetensors")
    renamed = {name.replace(".model.layers.", ".model.language_model.layers."): each for name, each in weights.items()}
    shutil.copy(adapters[0] / "adapter_config.json", tmp_path)
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RunError, match=r"leave out \d+ modules.*language_model") as caught:
        engine.load_adapter(tmp_path)
    assert caught.value.code == "adapter_unsupported"


def test_a_prompt_without_room_and_an_empty_one_are_refused(engine, ask, prompts):
    with pytest.raises(ValueError, match="max_model_len"):
        ask(max_new_tokens=250)
    with pytest.raises(ValueError, match="must hold a token"):
        engine.generate([[]], max_new_tokens=1, stop_ids=[])
    assert engine.generate([], max_new_tokens=1, stop_ids=[]) == []
