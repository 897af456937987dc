"""``top_entropy_quantile``: TRL's tokens, TRL's loss, and where the advantages go in a run."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer import train
from trl import GRPOTrainer

from erpo_core.loss import erpo_loss, response_weights, top_entropy_mask
from tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def trl_mask(entropies, mask, share: float):
    alone = SimpleNamespace(pad_across_processes=lambda tensor, **_: tensor, gather=lambda tensor: tensor)
    return GRPOTrainer.get_high_entropy_mask(SimpleNamespace(accelerator=alone), entropies, mask, 1 - share)


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), share=st.floats(0.01, 1.0), ties=st.booleans(), empty=st.booleans())
def test_the_tokens_are_trls(seed, share, ties, empty):
    generator = torch.Generator().manual_seed(seed)
    entropies = torch.rand(4, 9, generator=generator)
    entropies = entropies.mul(3).round() if ties else entropies
    mask = torch.zeros(4, 9) if empty else (torch.rand(4, 9, generator=generator) < 0.7).float()
    assert torch.equal(top_entropy_mask(entropies, mask, share), trl_mask(entropies, mask, share))


def test_padding_does_not_count():
    entropies = torch.tensor([[0.1, 0.2, 9.0], [0.3, 0.4, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    assert top_entropy_mask(entropies, mask, 0.5).tolist() == [[False, False, False], [True, True, False]]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_without_advantage_a_token_keeps_its_kl_and_its_place_in_the_denominators(loss_type):
    """The loss is TRL's: its policy term times the mask, its KL term and its denominators over every token."""
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]])
    entropies, logps = torch.rand(4, 4), -torch.rand(4, 4)
    old, ref = logps - 0.3 * torch.randn(4, 4), logps - 0.3 * torch.randn(4, 4)
    answers = torch.tensor([1.0, -1.0, 0.5, -0.5])
    top = top_entropy_mask(entropies, mask, 0.4)
    layout = {"num_generations": 2, "micro_batch": 4, "accumulation": 1}
    weights = response_weights(mask.sum(1)[None], 0, loss_type=loss_type, **layout)[:, None] * mask
    advantages = answers[:, None] * mask * top
    ours = erpo_loss(logps, old, ref, advantages, weights, epsilon=0.2, epsilon_high=0.2, beta=0.1).loss
    ratio = (logps - old).exp()
    policy = -torch.min(ratio * answers[:, None], ratio.clamp(0.8, 1.2) * answers[:, None]) * top
    token = policy + 0.1 * ((ref - logps).exp() - (ref - logps) - 1)
    if loss_type == "dapo":
        expected = (token * mask).sum() / mask.sum()
    else:
        expected = ((token * mask).sum(1) / mask.sum(1)).mean()
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("algorithm", ["erpo", "grpo"])
def test_in_a_run_only_the_most_uncertain_tokens_have_advantages(tiny, tmp_path, algorithm):
    from erpo_core.codec import decode_trace

    records = train(tiny, tmp_path, algorithm=algorithm, max_steps=2, top_entropy_quantile=0.25, num_generations=8)
    traces = [(trace.step, decode_trace(trace.payload)) for trace in records.by_kind["trace"]]
    for step in (1, 2):
        credited, silent = [], []
        for columns in (columns for number, columns in traces if number == step):
            moved = columns["advantage"] != 0
            credited += columns["entropy"][moved].tolist()
            silent += columns["entropy"][~moved].tolist()
        assert min(credited) > max(silent), "one group a step, and its rewards differ"
        assert len(credited) >= len(silent) / 3
