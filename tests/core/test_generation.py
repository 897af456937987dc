"""The transformers engine against transformers' own generate."""

import pytest
import torch

from erpo_core.generation.transformers import TransformersEngine
from tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 10]]


def test_greedy_answers_are_those_of_transformers(policy):
    model, tokenizer = policy
    ours = TransformersEngine(model, tokenizer).generate(
        PROMPTS, temperature=0, max_new_tokens=12, stop_ids=[tokenizer.eos_token_id]
    )
    for prompt, (answer,) in zip(PROMPTS, ours, strict=True):
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
        assert answer.token_ids == theirs
        assert answer.finished == (theirs[-1] == tokenizer.eos_token_id)


def test_answers_end_at_a_stop_token_and_the_others_go_on(policy):
    model, tokenizer = policy
    engine = TransformersEngine(model, tokenizer)
    free = engine.generate(PROMPTS, n=6, max_new_tokens=20, stop_ids=[], seed=3)
    tokens = [token for group in free for answer in group for token in answer.token_ids]
    stop = max(set(tokens), key=tokens.count)
    stopped = engine.generate(PROMPTS, n=6, max_new_tokens=20, stop_ids=[stop], seed=3)
    flat = [answer for group in stopped for answer in group]
    assert any(answer.finished for answer in flat)
    for answer in flat:
        assert answer.finished == (answer.token_ids[-1] == stop)
        assert stop not in answer.token_ids[:-1]
        assert answer.finished or len(answer.token_ids) == 20


def test_a_seed_fixes_the_answers_and_the_global_generator_is_untouched(policy):
    model, tokenizer = policy
    engine = TransformersEngine(model, tokenizer)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (
        engine.generate(PROMPTS, n=3, max_new_tokens=10, stop_ids=[2], seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert first == again != other


def test_sampled_tokens_follow_the_models_distribution(policy):
    model, tokenizer = policy
    with torch.no_grad():
        probs = model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(0)
    (answers,) = TransformersEngine(model, tokenizer).generate([PROMPTS[0]], n=4000, max_new_tokens=1, stop_ids=[])
    counts = torch.bincount(torch.tensor([a.token_ids[0] for a in answers]), minlength=len(probs))
    assert (counts / 4000 - probs).abs().max() < 5 * (probs.max() / 4000).sqrt()


def test_top_k_and_top_p_keep_only_what_they_say(policy):
    model, tokenizer = policy
    engine = TransformersEngine(model, tokenizer)
    (answers,) = engine.generate([PROMPTS[0]], n=300, top_k=2, max_new_tokens=1, stop_ids=[])
    assert len({a.token_ids[0] for a in answers}) <= 2
    (answers,) = engine.generate([PROMPTS[0]], n=50, top_p=1e-6, max_new_tokens=1, stop_ids=[])
    assert len({a.token_ids[0] for a in answers}) == 1
