"""The engine gives what transformers' own generate gives, and fan-out changes nothing but the speed."""

from itertools import chain
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from transformers import AutoModelForCausalLM  # noqa: E402

from erpo_core.generation import fixed  # noqa: E402
from erpo_core.generation.base import Sampling, watch_and_leave  # noqa: E402
from erpo_core.generation.cache import RoomyLayer  # noqa: E402
from erpo_core.generation.drawing import draw  # noqa: E402
from erpo_core.generation.snapshot import PackedLinear, PolicySnapshot  # noqa: E402
from erpo_core.generation.transformers import TransformersEngine  # noqa: E402
from erpo_core.job import LeftEarlyError  # noqa: E402
from erpo_core.models import load_model  # noqa: E402
from erpo_core.prefill import pad_prompts  # noqa: E402
from tiny_model import make_tiny_model  # noqa: E402

PROMPTS = ["What is 4 + 3?", "Why?", "A rather longer question than the other two."]
EXAMPLE = "A worked example that every prompt begins with, long enough to be computed once. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(folder):
    return load_model(folder, dtype=torch.float32)


@pytest.fixture
def engine(tiny):
    return TransformersEngine(*tiny)


def encoded(tokenizer, start=""):
    return [tokenizer(start + text)["input_ids"] for text in PROMPTS]


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("start", ["", EXAMPLE])
def test_greedy_answers_are_those_of_transformers_generate(tiny, start, fixed_shapes):
    model, tokenizer = tiny
    engine = TransformersEngine(model, tokenizer, fixed_shapes=fixed_shapes)
    stops = [tokenizer.eos_token_id, 40]
    prompts = encoded(tokenizer, start)
    mine = engine.generate(prompts, n=1, temperature=0, max_new_tokens=90, stop_ids=stops)
    for prompt, (sample,) in zip(prompts, mine, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, do_sample=False, max_new_tokens=90, eos_token_id=stops)[0, len(prompt) :].tolist()
        assert sample.token_ids == theirs
        assert sample.finished == (theirs[-1] in stops)


def test_fan_out_equals_repeated_prompts(tiny, engine):
    prompts = encoded(tiny[1])
    common = {"temperature": 1.0, "max_new_tokens": 20, "stop_ids": [2, 50, 60, 70], "seed": 3}
    fanned = engine.generate(prompts, n=4, **common)
    repeated = engine.generate([prompt for prompt in prompts for _ in range(4)], n=1, **common)
    assert [sample.token_ids for group in fanned for sample in group] == [group[0].token_ids for group in repeated]
    assert len({tuple(sample.token_ids) for sample in fanned[0]}) > 1


def test_an_answer_does_not_depend_on_when_others_end(tiny, engine):
    prompt = encoded(tiny[1])[:1]
    common = {"n": 8, "temperature": 1.0, "max_new_tokens": 24, "seed": 5}
    free = engine.generate(prompt, stop_ids=[], **common)[0]
    stopped = engine.generate(prompt, stop_ids=[2, 50, 60, 70, 80, 90, 100], **common)[0]
    assert len({len(sample.token_ids) for sample in stopped}) > 1
    for whole, part in zip(free, stopped, strict=True):
        assert whole.token_ids[: len(part.token_ids)] == part.token_ids


@pytest.mark.parametrize("start", ["", EXAMPLE])
@pytest.mark.parametrize("sampling", [{"temperature": 1.3}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 5}])
def test_fixed_shapes_change_nothing_but_the_speed(tiny, engine, sampling, start):
    model, tokenizer = tiny
    call = {"n": 4, "max_new_tokens": 600, "stop_ids": [2, 50], "seed": 3, **sampling}
    growing = engine.generate(encoded(tokenizer, start), **call)
    batches, make = [], fixed.FixedBatch.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixed, "SMALL", 4)
        patch.setattr(fixed.FixedBatch, "__init__", lambda *a, **k: (batches.append(a), make(*a, **k))[1])
        found = TransformersEngine(model, tokenizer, fixed_shapes=True).generate(encoded(tokenizer, start), **call)
    assert len(batches) > 2, "made anew when half has ended, and when its columns are used up"
    for one, two in zip(chain(*growing), chain(*found), strict=True):
        assert (one.token_ids, one.finished) == (two.token_ids, two.finished)
        if one.logps is not None:
            torch.testing.assert_close(torch.tensor(one.logps), torch.tensor(two.logps), atol=1e-4, rtol=0)
    assert model.config._attn_implementation != fixed.ATTENTION


def test_the_same_seed_gives_the_same_answers_and_another_seed_others(tiny, engine):
    prompts = encoded(tiny[1])
    common = {"n": 2, "temperature": 1.0, "max_new_tokens": 16, "stop_ids": [2]}
    assert engine.generate(prompts, seed=1, **common) == engine.generate(prompts, seed=1, **common)
    assert engine.generate(prompts, seed=1, **common) != engine.generate(prompts, seed=2, **common)


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_a_job_that_is_asked_to_leave_gives_its_answers_up_at_once(tiny, fixed_shapes):
    engine, told, stop = TransformersEngine(*tiny, fixed_shapes=fixed_shapes), [], SimpleNamespace(requested=False)

    def watch(tokens, ended):
        told.append(tokens)
        stop.requested = sum(told) >= 30

    engine.watch = watch_and_leave(stop, watch)
    with pytest.raises(LeftEarlyError):
        engine.generate(encoded(tiny[1]), n=2, max_new_tokens=90, stop_ids=[])
    assert 30 <= sum(told) < 30 + 6 * fixed.CHUNK
    engine.watch = None
    assert engine.generate(encoded(tiny[1]), max_new_tokens=2, stop_ids=[]), "the engine is as good as before"


def test_the_prompt_is_computed_once_and_ended_answers_leave_the_batch(tiny, engine, monkeypatch):
    model, tokenizer = tiny
    shapes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: (shapes.append(tuple(kw["input_ids"].shape)), forward(**kw))[1])
    prompts = encoded(tokenizer)
    stops = list(range(2, 200, 3))
    samples = engine.generate(prompts, n=4, temperature=1.0, max_new_tokens=12, stop_ids=stops)
    assert shapes[0] == (3, max(map(len, prompts)))
    lengths = [len(sample.token_ids) for group in samples for sample in group]
    assert [rows for rows, _ in shapes[1:]] == [sum(n > step for n in lengths) for step in range(1, max(lengths))]


def test_what_all_prompts_begin_with_is_computed_once(tiny, engine, monkeypatch):
    model, tokenizer = tiny
    prompts = encoded(tokenizer, EXAMPLE)
    shared = pad_prompts(prompts, 0, "cpu").shared
    shapes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: (shapes.append(tuple(kw["input_ids"].shape)), forward(**kw))[1])
    engine.generate(prompts, n=2, max_new_tokens=2, stop_ids=[])
    assert shared == len(tokenizer(EXAMPLE)["input_ids"])
    assert shapes == [(1, shared), (3, max(map(len, prompts)) - shared), (6, 1)]


def test_the_cache_grows_in_place_and_follows_a_selection_of_rows():
    layer, whole = RoomyLayer(), torch.randn(4, 2, 300, 8)
    places = set()
    for token in range(250):
        keys, values = layer.update(whole[:, :, token : token + 1], -whole[:, :, token : token + 1])
        places.add(keys.data_ptr())
    assert len(places) < 6
    layer.batch_select_indices(torch.tensor([0, 3]))
    for token in range(250, 300):
        keys, values = layer.update(whole[[0, 3], :, token : token + 1], -whole[[0, 3], :, token : token + 1])
    assert torch.equal(keys, whole[[0, 3]])
    assert torch.equal(values, -whole[[0, 3]])
    assert layer.get_seq_length() == 300


def test_the_cache_refuses_a_gradient_that_it_would_lose():
    with pytest.raises(RuntimeError, match="DynamicCache"):
        RoomyLayer().update(torch.randn(1, 1, 1, 2, requires_grad=True), torch.randn(1, 1, 1, 2))


def test_a_peft_model_samples_and_keeps_its_mode_and_gradients(tmp_path):
    peft = pytest.importorskip("peft")
    model, tokenizer = load_model(make_tiny_model(tmp_path), dtype=torch.float32)
    plain = TransformersEngine(model, tokenizer).generate(
        encoded(tokenizer), temperature=0, max_new_tokens=8, stop_ids=[2]
    )
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5))
    model.train()
    frozen = model.base_model.model.model.layers[0]
    frozen.eval()
    engine = TransformersEngine(model, tokenizer)
    assert engine.generate(encoded(tokenizer), temperature=0, max_new_tokens=8, stop_ids=[2]) == plain
    assert model.training
    assert not frozen.training
    frozen.train()
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert any(p.grad is not None for p in model.parameters())


def test_draws_follow_the_distribution():
    probs = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniform = torch.arange(0, 1, 1e-4, dtype=torch.float64)
    tokens = draw(probs.log().expand(len(uniform), 4), Sampling(1.0), uniform)
    shares = torch.bincount(tokens, minlength=4) / len(uniform)
    assert torch.allclose(shares, probs, atol=2e-4)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0, top_k=2), {0, 2}),
        (Sampling(1.0, top_p=0.79), {0, 2}),
        (Sampling(1.0, top_p=0.5), {0}),
        (Sampling(1.0, top_p=1e-9), {0}),
        (Sampling(1e-3), {0}),
        (Sampling(1.0, top_k=99), {0, 2, 3}),
    ],
)
def test_top_k_and_top_p_keep_the_most_likely_tokens(sampling, expected):
    uniform = torch.linspace(0, 0.99999, 1000, dtype=torch.float64)
    logits = torch.tensor([0.5, 0.0, 0.3, 0.2]).log().expand(1000, 4)
    assert set(draw(logits, sampling, uniform).tolist()) == expected


def test_an_empty_prompt_is_refused_and_no_prompt_gives_nothing(engine):
    assert engine.generate([], n=2, max_new_tokens=4, stop_ids=[2]) == []
    with pytest.raises(ValueError, match="prompts"):
        engine.generate([[]], max_new_tokens=4, stop_ids=[2])


def adapted(path, **changes):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | changes
    return get_peft_model(model, LoraConfig(**settings)).eval()


def test_a_snapshot_samples_what_the_policy_samples_and_leaves_its_base_alone(folder, tiny):
    policy = adapted(folder)
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    # As TRL does: a method of the instance that still means the instance after a copy.
    base = policy.get_base_model()
    base.forward = lambda *given, forward=base.forward, **named: forward(*given, **named)
    snapshot = PolicySnapshot(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.05
                before |= {name: p.clone() for name, p in policy.named_parameters() if p is parameter}
    snapshot.refresh()
    ids = torch.tensor([encoded(tiny[1])[0]])
    torch.testing.assert_close(snapshot.model(ids).logits, policy(ids).logits, atol=1e-4, rtol=1e-4)
    with policy.disable_adapter():
        assert (snapshot.model(ids).logits - policy(ids).logits).abs().max() > 1e-2
    common = {"temperature": 1.0, "max_new_tokens": 12, "stop_ids": [2, 50, 60], "seed": 3}
    prompts = encoded(tiny[1])
    answers = [TransformersEngine(m, tiny[1]).generate(prompts, n=7, **common) for m in (policy, snapshot.model)]
    ids_of = [[sample.token_ids for group in groups for sample in group] for groups in answers]
    assert ids_of[0] == ids_of[1]
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.named_parameters())


def test_a_snapshot_is_exact_where_the_policy_is_rounded(folder, tiny):
    policy = adapted(folder)
    ids = torch.tensor([encoded(tiny[1])[0]])
    exact = policy(ids).logits
    snapshot = PolicySnapshot(policy)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        snapshot.refresh()
        found, rounded = snapshot.model(ids).logits, policy(ids).logits
    torch.testing.assert_close(found, exact, atol=1e-4, rtol=1e-4)
    assert (rounded - exact).abs().max() > 1e-3


@pytest.mark.parametrize("rows", [1, 3, 9, 16, 17, 64, 65])
def test_a_packed_linear_is_a_linear(rows):
    plain = torch.nn.Linear(24, 40)
    packed = PackedLinear(plain)
    states = torch.randn(rows, 1, 24)
    with torch.no_grad():
        for weight in (plain.weight, plain.weight.copy_(torch.randn(40, 24))):
            packed.fill(weight)
            torch.testing.assert_close(packed(states), plain(states), atol=1e-5, rtol=1e-5)


with_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="a CPU that computes in bfloat16"
)


@with_bfloat16
def test_a_snapshot_of_a_bfloat16_base_is_nearer_to_the_exact_policy_than_the_policy_is(folder, tiny):
    policy = adapted(folder)
    policy.get_base_model().bfloat16()
    snapshot = PolicySnapshot(policy)
    snapshot.refresh()
    ids = torch.tensor([encoded(tiny[1])[0]])
    with torch.no_grad():
        found, rounded = snapshot.model(ids).logits, policy(ids).logits.float()
        exact = policy.float()(ids).logits
        with policy.disable_adapter():
            start = policy(ids).logits
    assert 0 < (found - exact).norm() < (rounded - exact).norm() < 0.1 * (start - exact).norm()


@with_bfloat16
def test_a_packed_linear_in_bfloat16_moves_by_updates_that_its_weight_would_round_off(folder):
    weight, states = (1 + torch.rand(40, 24)).bfloat16(), torch.randn(5, 2, 24)
    down, up = torch.randn(24, 4) * 1e-3, torch.randn(4, 40) * 1e-2
    packed = PackedLinear(torch.nn.Linear(24, 40, bias=False))
    packed.fill(weight)
    before = packed(states)
    packed.updates = [(down, up)]
    torch.testing.assert_close(before, states.bfloat16().float() @ weight.float().T, atol=0.1, rtol=0.02)
    torch.testing.assert_close(packed(states) - before, states @ down @ up, atol=5e-6, rtol=1e-2)
    assert torch.equal((weight.float() + (down @ up).T).bfloat16(), weight)


def test_only_plain_lora_has_a_snapshot(folder):
    assert PolicySnapshot.suits(adapted(folder))
    assert not PolicySnapshot.suits(adapted(folder, use_dora=True))
    assert not PolicySnapshot.suits(adapted(folder).half())
    assert not PolicySnapshot.suits(AutoModelForCausalLM.from_pretrained(folder))


def test_the_engines_own_log_probabilities_are_those_of_the_model(tiny, engine):
    prompt = encoded(tiny[1])[0]
    (group,) = engine.generate([prompt], n=2, temperature=0.7, max_new_tokens=9, stop_ids=[2], seed=1)
    for sample in group:
        ids = torch.tensor([prompt + sample.token_ids])
        logps = (engine.model(ids).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(1)
        expected = logps.gather(1, torch.tensor(sample.token_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(sample.logps), expected, atol=1e-4, rtol=1e-4)
    (cut,) = engine.generate([prompt], n=1, top_k=3, max_new_tokens=3, stop_ids=[2])
    assert cut[0].logps is None
