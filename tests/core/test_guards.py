"""Numbers that are not finite are skipped and told, and the noise of the progress signal is measured and used."""

import numpy as np
import pytest
import torch
from test_trainer_runs import make_trainer

from erpo_core.errors import RunError
from erpo_core.trainer import credit
from tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def test_a_gradient_that_is_not_finite_is_skipped_and_then_fails_the_run(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, max_steps=6, max_skipped_steps=2)
    broken = {"left": 2}
    parameter = next(p for n, p in trainer.model.named_parameters() if "lora_B" in n)

    def poison(gradient):
        broken["left"] -= 1
        return gradient * float("nan") if broken["left"] >= 0 else gradient

    handle = parameter.register_hook(poison)
    trainer.train()
    assert trainer.run_state.skipped_steps == 2
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    handle.remove()
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(RunError) as caught:
        trainer.train()
    assert caught.value.code == "nonfinite_loss"


def test_the_failure_names_the_gradients_that_are_not_finite_and_no_others(tiny, tmp_path):
    """transformers' clipping spreads one NaN over all of them."""
    trainer = make_trainer(tiny, tmp_path, max_skipped_steps=0)
    name, parameter = next((n, p) for n, p in trainer.model.named_parameters() if "lora_B" in n)
    values = torch.linspace(-2, 1, parameter.numel()).view(parameter.shape)
    values.view(-1)[3:6] = torch.tensor([float("nan"), float("nan"), float("inf")])
    parameter.register_hook(lambda gradient: values)
    with pytest.raises(RunError) as caught:
        trainer.train()
    trained = sum(p.requires_grad for p in trainer.model.parameters())
    assert f"1 of {trained} gradients, first {name} (-2 to 1, 2 NaN, 1 Inf); weights" in caught.value.message
    assert len(caught.value.message) < 400


def test_scores_that_are_not_finite_skip_the_step_as_well(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, max_steps=3)
    score = trainer._scores

    def overflow(*given):
        scores = score(*given)
        if trainer.state.global_step == 1:
            object.__setattr__(scores, "logps", scores.logps * float("nan"))
        return scores

    trainer._scores = overflow
    output = trainer.train()
    assert trainer.run_state.skipped_steps == 1
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [np.isfinite(loss) for loss in losses] == [True, False, True], "told as it is, and once"
    assert output.training_loss == pytest.approx((losses[0] + losses[2]) / 3)


def test_the_noise_is_measured_as_often_as_asked_also_where_answers_are_used_again(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, max_steps=12, noise_floor_every=4, num_iterations=3)
    score, measured = trainer._scores, set()

    def look(policy, rollouts, *given):
        if rollouts.num_generations < 4:
            measured.add(trainer.state.global_step)
        return score(policy, rollouts, *given)

    trainer._scores = look
    trainer.train()
    assert measured == {0, 6}, "at the first generation that comes after so many steps"


@pytest.mark.parametrize("broken_step", [0, 2])
def test_a_noise_measurement_that_is_not_finite_is_made_again_at_the_next_step(tiny, tmp_path, broken_step):
    trainer = make_trainer(tiny, tmp_path, max_steps=4, noise_floor_every=2)
    score, noises, measured = trainer._scores, [], []

    def overflow(policy, rollouts, *given):
        scores = score(policy, rollouts, *given)
        if rollouts.num_generations < 4:
            measured.append(trainer.state.global_step)
        if trainer.state.global_step == broken_step:
            object.__setattr__(scores, "logps", scores.logps * float("nan"))
        return scores

    trainer._scores = overflow
    compute = trainer._compute_loss
    trainer._compute_loss = lambda *given: (compute(*given), noises.append(trainer.run_state.noise))[0]
    trainer.train()
    assert trainer.run_state.skipped_steps == 1
    assert sorted(set(measured)) == ([0, 1, 3] if broken_step == 0 else [0, 2, 3])
    assert noises[broken_step] == (0.0 if broken_step == 0 else noises[1])
    assert np.isfinite(noises).all()


@pytest.mark.parametrize("floor", ["auto", 0.0, 1e-6])
def test_the_signal_to_noise_ratio_is_over_the_noise_that_was_measured(tiny, tmp_path, monkeypatch, floor):
    monkeypatch.setattr(credit, "measure_noise", lambda *_, **__: 1e-3)
    trainer = make_trainer(tiny, tmp_path, progress_noise_floor=floor)
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "entropy" in entry][-1]
    assert last["erpo/progress_std"] > 0
    if floor == "auto":
        assert last["erpo/progress_snr"] == last["erpo/progress_std"] / 1e-3
    else:
        assert last["erpo/progress_snr"] is last["erpo/progress_noise"] is None, "nothing was measured"
