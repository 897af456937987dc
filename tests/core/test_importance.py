"""The correction for an engine that is not exactly the trainer: the ratios, and the loss that they weigh."""

import math
from itertools import product

import pytest
import torch
from test_trainer_runs import make_trainer

from erpo_core.generation.base import Sample
from erpo_core.loss import importance_ratios
from erpo_core.specs import parse_spec
from erpo_core.trainer.config import ERPOConfig
from erpo_core.trainer.rows import pad_logps
from tiny_model import make_tiny_model

BODY = {"model": "m", "dataset": "d", "vllm_importance_sampling_correction": True}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask"])
@pytest.mark.parametrize(("clip_min", "clip_max"), [(None, 2.0), (0.6, 3.0), (0.6, None)])
def test_ratios_are_those_of_a_plain_loop(mode, clip_min, clip_max):
    generator = torch.Generator().manual_seed(0)
    logps, engine = -5 * torch.rand(2, 4, 9, generator=generator)
    engine[1, 3:], engine[2] = torch.nan, torch.nan
    bounds = {"clip_min": clip_min, "clip_max": clip_max}
    ratios, clipped = importance_ratios(logps, engine, mode=mode, **bounds)
    for place in torch.ones(4, 9).nonzero().tolist():
        given, ours = engine[*place].item(), logps[*place].item()
        ratio = 1.0 if math.isnan(given) else math.exp(ours - given)
        outside = not (clip_min or 0) <= ratio <= (math.inf if clip_max is None else clip_max)
        if outside:
            ratio = 0.0 if mode == "token_mask" else min(max(ratio, clip_min or 0), clip_max or math.inf)
        assert ratios[*place].item() == pytest.approx(ratio, rel=1e-5)
        assert clipped[*place].item() == outside
    assert 0 < clipped.sum() < clipped.numel()


def test_each_token_of_a_training_step_is_weighed(tiny, tmp_path):
    """The gradient is that of sum w rho (A + beta d k3), by autograd on the scored log-probabilities."""
    trainer = make_trainer(tiny, tmp_path, max_steps=1, beta=0.1)
    trainer.args.vllm_importance_sampling_correction = True
    trainer.args.vllm_importance_sampling_clip_max = 1.5
    generate = trainer._generate_single_turn

    def as_if_from_another_engine(*args, **kwargs):
        found, _ = generate(*args, **kwargs)
        trainer._samples = [
            Sample(s.token_ids, s.finished, [v - 0.8 + 0.2 * i for i, v in enumerate(s.logps)] if row else None)
            for row, s in enumerate(trainer._samples)
        ]
        return found, None

    trainer._generate_single_turn = as_if_from_another_engine
    seen = {}
    scores = trainer._scores

    def keep(policy, rollouts, reference=None):
        found = scores(policy, rollouts, reference)
        if found.logps.requires_grad:
            found.logps.register_hook(lambda gradient: seen.update(gradient=gradient))
        return found

    trainer._scores = keep
    trainer.train()
    (batch,) = trainer.rollout_log
    scored, mask, expected, capped = batch.last_scored, batch.rollouts.mask, [], 0
    for row, place in mask.nonzero().tolist():
        # At the first step policy and reference are one, so that the slope of k3 is 0 and of the surrogate A.
        ratio = math.exp(0.8 - 0.2 * place) if row else 1.0
        capped += ratio > 1.5
        expected.append(-batch.weights[row].item() * min(ratio, 1.5) * scored.advantages[row, place].item())
    torch.testing.assert_close(seen["gradient"], torch.tensor(expected), atol=1e-6, rtol=1e-3)
    logged = next(entry for entry in trainer.state.log_history if "reward" in entry)
    assert logged["sampling/importance_sampling_ratio/clipped"] == pytest.approx(capped / len(expected))
    assert logged["sampling/importance_sampling_ratio/max"] == pytest.approx(1.5)
    assert logged["erpo/advantage_sum_residual"] < 1e-4 < logged["erpo/advantage_sum_residual_applied"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({}, "vllm_importance_sampling_correction: only with use_vllm"),
        ({"use_vllm": True, "top_p": 0.9}, "top_p: "),
        ({"use_vllm": True, "top_k": 50}, "top_k: "),
        ({"use_vllm": True, "vllm_importance_sampling_mode": "sequence_mask"}, "vllm_importance_sampling_mode"),
    ],
)
def test_an_order_that_cannot_be_corrected_names_the_field(changes, field):
    with pytest.raises(ValueError, match=field):
        parse_spec("train", BODY | changes)
    assert parse_spec("train", BODY | {"use_vllm": True}).vllm_importance_sampling_clip_max == 3.0


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask"])
@pytest.mark.parametrize(("low", "high"), [*product([None, 0.5, 1.0], [None, 1.0, 3.0])])
def test_bounds_are_refused_where_trl_refuses_them(tmp_path, correction, mode, low, high):
    settings = {
        "use_vllm": True,
        "vllm_importance_sampling_correction": correction,
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_min": low,
        "vllm_importance_sampling_clip_max": high,
    }

    def refusal(make) -> str:
        try:
            make()
        except ValueError as error:
            return str(error)
        return ""

    of_trl = refusal(lambda: ERPOConfig(str(tmp_path), use_cpu=True, **settings))
    ours = refusal(lambda: parse_spec("train", BODY | settings))
    assert bool(ours) == bool(of_trl)
    assert ours.count("vllm_importance_sampling_clip_m") == of_trl.count("vllm_importance_sampling_clip_m")


def test_a_cut_distribution_is_refused_in_a_script_as_well(tmp_path):
    with pytest.raises(ValueError, match="top_p=1"):
        ERPOConfig(str(tmp_path), use_cpu=True, use_vllm=True, top_p=0.9, vllm_importance_sampling_correction=True)


def test_log_probs_that_the_engine_did_not_give_are_not_numbers():
    found = pad_logps([[-1.5, -2.0], None, [-9.0, -9.0, -9.0]], torch.zeros(3, 3, dtype=torch.bool))
    assert found[0, :2].tolist() == [-1.5, -2.0]
    assert found.isnan().sum(1).tolist() == [1, 3, 0]
