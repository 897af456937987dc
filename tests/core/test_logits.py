"""The head: entropies and log-probabilities against float64, and the cached gradient against autograd."""

import math

import pytest
import torch

from erpo_core.logits import LogitForm, score_tokens, top_alternatives


def case(num_tokens=37, vocabulary=211, size=24, scale=3.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, size, generator=generator) * scale
    weight = torch.randn(vocabulary, size, generator=generator)
    targets = torch.randint(vocabulary, (num_tokens,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), targets


def reference(hidden, weight, targets, temperature=1.0):
    z = hidden.double() @ weight.double().T / temperature
    logp = z.log_softmax(1)
    p = logp.exp()
    h = -(p * logp).sum(1)
    var = (p * logp.square()).sum(1) - h.square()
    chosen = logp.gather(1, targets[:, None]).squeeze(1)
    ranks = (logp > chosen[:, None]).sum(1)
    return chosen, h, var, p.amax(1), ranks


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_equal_a_float64_softmax_of_the_same_numbers(temperature, dtype):
    hidden, weight, targets = case(dtype=dtype)
    scores = score_tokens(hidden, weight, targets, temperature=temperature)
    logp, h, var, top, ranks = reference(hidden, weight, targets, temperature)
    torch.testing.assert_close(scores.logps.double(), logp, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(scores.entropies.double(), h, atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.varentropies.double(), var, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(scores.top_probs.double(), top, atol=1e-5, rtol=1e-4)
    assert scores.ranks.tolist() == ranks.tolist()


@pytest.mark.parametrize("tile_elements", [None, 40 * 512])
def test_a_large_vocabulary_loses_nothing(tile_elements):
    """Tens of thousands of small terms beside a few large ones: what is added in order, in float32, loses them."""
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden = torch.randn(2, 40, 64, generator=generator)
    weight = torch.randn(49_152, 64, generator=generator) / 2
    targets = torch.randint(0, 49_152, (40,), generator=generator)
    scores = score_tokens(hidden, weight, targets, ref_hidden=ref_hidden, tile_elements=tile_elements)
    logps, ref_logps = ((states.double() @ weight.double().T).log_softmax(1) for states in (hidden, ref_hidden))
    entropies = -(logps.exp() * logps).sum(1)
    assert entropies.mean() > 2
    torch.testing.assert_close(scores.entropies.double(), entropies, atol=2e-5, rtol=0)
    torch.testing.assert_close(scores.kls.double(), (logps.exp() * (logps - ref_logps)).sum(1), atol=1e-4, rtol=1e-5)


def test_uniform_logits_have_the_entropy_of_the_vocabulary():
    scores = score_tokens(torch.zeros(3, 8), torch.randn(1000, 8), torch.tensor([0, 5, 9]))
    torch.testing.assert_close(scores.entropies, torch.full((3,), math.log(1000)))
    torch.testing.assert_close(scores.logps, torch.full((3,), -math.log(1000)))


def test_a_certain_token_has_entropy_zero():
    scores = score_tokens(torch.full((1, 1), 1e4), torch.tensor([[1.0], [0.0], [-1.0]]), torch.tensor([0]))
    assert scores.entropies.item() == 0
    assert scores.logps.item() == 0
    assert scores.ranks.item() == 0


def test_a_constant_added_to_all_logits_changes_nothing():
    hidden, weight, targets = case()
    plain = score_tokens(hidden, weight, targets)
    shifted = score_tokens(hidden, weight, targets, bias=torch.full((len(weight),), 1000.0))
    torch.testing.assert_close(plain.entropies, shifted.entropies, atol=2e-3, rtol=0)
    torch.testing.assert_close(plain.logps, shifted.logps, atol=2e-3, rtol=0)


def test_impossible_tokens_contribute_nothing():
    hidden, weight, targets = case()
    bias = torch.zeros(len(weight))
    bias[100:] = -torch.inf
    scores = score_tokens(hidden, weight, targets % 100, bias=bias)
    expected = score_tokens(hidden, weight[:100], targets % 100)
    torch.testing.assert_close(scores.entropies, expected.entropies)
    torch.testing.assert_close(scores.logps, expected.logps)


@pytest.mark.parametrize("tile_elements", [1, 37, 500, 37 * 210])
def test_the_size_of_a_tile_changes_nothing(tile_elements):
    hidden, weight, targets = case()
    weight[50:100] *= 4  # the highest logit is in the middle, so that the sums move to it
    ref_hidden = case(seed=1)[0]

    def scores(**more):
        policy = hidden.clone().requires_grad_()
        found = score_tokens(policy, weight, targets, ref_hidden=ref_hidden, bias=-weight[:, 0], **more)
        found.logps.sum().backward()
        return [*vars(found).values(), policy.grad]

    for whole, parts in zip(scores(), scores(tile_elements=tile_elements), strict=True):
        torch.testing.assert_close(whole, parts, atol=2e-4, rtol=1e-5)


def test_blocks_of_tokens_are_scored_alike():
    hidden, weight, targets = case(num_tokens=1100)
    whole = score_tokens(hidden, weight, targets)
    parts = score_tokens(hidden, weight, targets, tile_elements=5 * len(weight))
    torch.testing.assert_close(whole.entropies, parts.entropies)
    torch.testing.assert_close(whole.ranks, parts.ranks)


@pytest.mark.parametrize("own_head", [False, True])
def test_the_reference_is_scored_in_the_same_pass(own_head):
    hidden, weight, targets = case()
    ref_hidden, ref_weight, _ = case(seed=1)
    ref_weight = ref_weight if own_head else weight
    bias = weight[:, 0]
    ref_bias = ref_weight[:, 1] if own_head else bias
    scores = score_tokens(
        hidden,
        weight,
        targets,
        temperature=0.7,
        ref_hidden=ref_hidden,
        bias=bias,
        ref_weight=ref_weight if own_head else None,
        ref_bias=ref_bias if own_head else None,
        details=False,
        tile_elements=4 * len(weight),
    )
    policy, ref = (
        ((h.double() @ w.double().T + b.double()) / 0.7).log_softmax(1)
        for h, w, b in ((hidden, weight, bias), (ref_hidden, ref_weight, ref_bias))
    )
    expected = (policy.exp() * (policy - ref)).sum(1)
    chosen = ref.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(scores.ref_logps.double(), chosen, atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(scores.kls.double(), expected, atol=1e-3, rtol=1e-5)
    assert scores.ranks is None
    alone = score_tokens(hidden, weight, targets, temperature=0.7, bias=bias)
    torch.testing.assert_close(scores.logps, alone.logps)


def test_equal_models_have_no_divergence_and_no_progress():
    hidden, weight, targets = case()
    scores = score_tokens(hidden, weight, targets, ref_hidden=hidden)
    assert torch.equal(scores.logps, scores.ref_logps)
    assert scores.kls.abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_cached_gradient_is_autograds(temperature):
    hidden, weight, targets = case()
    advantages = torch.randn(len(targets))
    ours = hidden.clone().requires_grad_()
    scores = score_tokens(ours, weight, targets, temperature=temperature)
    (scores.logps * advantages).sum().backward()
    theirs = hidden.clone().requires_grad_()
    logp = (theirs @ weight.T / temperature).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    (logp * advantages).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)
    assert not scores.entropies.requires_grad
    direction = (weight[targets] - (hidden @ weight.T / temperature).softmax(1) @ weight) / temperature
    torch.testing.assert_close(scores.leverage_norms, direction.norm(dim=1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", [LogitForm(scale=0.25), LogitForm(cap=5.0), LogitForm(scale=0.5, cap=3.0)], ids=str)
@pytest.mark.parametrize("tile_elements", [None, 4 * 640])
def test_scaled_and_capped_logits_are_scored_as_autograd_scores_them(form, tile_elements):
    hidden, weight, targets = case()
    ref_hidden, ref_weight, _ = case(seed=1)
    bias, ours, theirs = weight[:, 0], hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    more = {"temperature": 0.7, "bias": bias, "form": form}
    scores = score_tokens(
        ours, weight, targets, ref_hidden=ref_hidden, ref_weight=ref_weight, tile_elements=tile_elements, **more
    )
    products = theirs @ weight.double().T + bias.double()
    ref_products = ref_hidden.double() @ ref_weight.double().T
    logps, ref_logps = ((form.of(z) / 0.7).log_softmax(1) for z in (products, ref_products))
    advantages, chosen = torch.randn(len(targets)), targets[:, None]
    (scores.logps * advantages).sum().backward()
    (direction,) = torch.autograd.grad((logps.gather(1, chosen)[:, 0] * advantages).sum(), theirs)
    torch.testing.assert_close(ours.grad.double(), direction, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        scores.leverage_norms.double(), (direction / advantages[:, None]).norm(dim=1), rtol=1e-4, atol=1e-4
    )
    found = {"logps": logps.gather(1, chosen)[:, 0], "ref_logps": ref_logps.gather(1, chosen)[:, 0]}
    found |= {"entropies": -(logps.exp() * logps).sum(1), "kls": (logps.exp() * (logps - ref_logps)).sum(1)}
    for name, expected in found.items():
        torch.testing.assert_close(getattr(scores, name).double(), expected.detach(), atol=2e-4, rtol=1e-4)
    ids, values = top_alternatives(hidden, weight, 4, **more)
    torch.testing.assert_close(values.double(), logps.detach().gather(1, ids), atol=2e-4, rtol=1e-4)


def test_a_trainable_head_is_refused_by_name():
    hidden, weight, targets = case()
    with pytest.raises(ValueError, match="weight"):
        score_tokens(hidden.requires_grad_(), weight.requires_grad_(), targets)


def test_no_tokens_give_no_scores():
    hidden, weight, targets = case(num_tokens=0)
    assert score_tokens(hidden, weight, targets).logps.shape == (0,)
    assert top_alternatives(hidden, weight, 3)[0].shape == (0, 3)


def test_alternatives_are_the_most_likely_tokens():
    hidden, weight, _ = case()
    ids, logps = top_alternatives(hidden, weight, 4, temperature=0.8)
    expected = (hidden @ weight.T / 0.8).log_softmax(1).topk(4, dim=1)
    assert ids.tolist() == expected.indices.tolist()
    torch.testing.assert_close(logps, expected.values, atol=1e-5, rtol=1e-5)
