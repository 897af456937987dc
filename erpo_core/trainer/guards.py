"""Two callbacks that every ERPOTrainer has: no step on a gradient that is not finite, no checkpoint inside a cycle."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

from erpo_core.errors import RunError
from erpo_core.trainer.ranks import gather_list, total_of
from erpo_core.trainer.sharding import goes_in_step, gradients, local

if TYPE_CHECKING:
    from erpo_core.trainer.trainer import ERPOTrainer


@dataclass(frozen=True)
class Spread:
    """Smallest and largest finite value of a tensor, or of a part, and how many of its values are not finite."""

    low: float
    high: float
    nans: int
    infs: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Spread":
        """That of a tensor."""
        finite = tensor[torch.isfinite(tensor)]
        low, high = (finite.min().item(), finite.max().item()) if len(finite) else (math.inf, -math.inf)
        return cls(low, high, int(tensor.isnan().sum()), int(tensor.isinf().sum()))

    def __add__(self, other: "Spread") -> "Spread":
        low, high = min(self.low, other.low), max(self.high, other.high)
        return Spread(low, high, self.nans + other.nans, self.infs + other.infs)

    def __str__(self) -> str:
        span = f"{self.low:.3g} to {self.high:.3g}" if self.low <= self.high else "no finite value"
        return f"{span}, {self.nans} NaN, {self.infs} Inf"


class SkipNonFinite(TrainerCallback):
    """A step whose gradient is not finite is skipped and counted; after ``max_skipped_steps`` the job fails.

    The trainer calls :meth:`look` before transformers clips the gradients: one that is not finite makes all of them so.

    Raises:
        RunError: ``nonfinite_loss``.
    """

    def __init__(self, trainer: "ERPOTrainer") -> None:
        self._trainer = trainer
        self._bad: dict[str, Spread] | None = None
        self._total_loss = 0.0

    def look(self) -> None:
        """Remember which of the summed gradients are not finite. All ranks must call it, once for a step."""
        model, accelerator = self._trainer.model, self._trainer.accelerator
        found = gradients(model)
        norms = [gradient.float().norm() for gradient in found.values()]
        fine = not norms or bool(torch.isfinite(torch.stack(norms).sum()))
        self._bad = None
        if not total_of(accelerator, [float(not fine)])[0]:
            return
        bad = [
            (name, Spread.of(gradient))
            for (name, gradient), norm in zip(found.items(), norms, strict=True)
            if not torch.isfinite(norm)
        ]
        self._bad = {}
        # The ranks have parts of the gradients, or all of them have the same.
        for name, spread in gather_list(accelerator, bad) if goes_in_step(model) else bad:
            self._bad[name] = self._bad[name] + spread if name in self._bad else spread

    def on_train_begin(self, args, state, control, **kwargs):
        self._total_loss = 0.0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        bad, self._bad = self._bad, None
        if bad is None:
            return
        # The optimizer leaves parameters without a gradient as they are, its moments and weight decay included;
        # DeepSpeed's drops such a gradient by itself.
        model.zero_grad(set_to_none=True)
        self._trainer.run_state.skipped_steps += 1
        if self._trainer.run_state.skipped_steps > args.max_skipped_steps:
            trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            told = ", ".join([f"{name} ({bad[name]})" for name, _ in trained if name in bad][:3])
            weights = ", ".join([name for name, p in trained if not _finite(local(p))][:3])
            raise RunError(
                f"{self._trainer.run_state.skipped_steps} steps had a gradient that is not finite, the last one step "
                f"{state.global_step + 1}: {len(bad)} of {len(trained)} gradients, first {told or 'none'}; "
                f"weights that are not finite: {weights or 'none'}",
                code="nonfinite_loss",
            )

    def keep_sums_finite(self, logs: dict[str, float]) -> None:
        """A loss that is not finite is logged as it is, once: transformers' sums would never be finite again."""
        if "loss" not in logs:
            return
        if math.isfinite(logs["loss"]):
            self._total_loss = self._trainer._total_loss_scalar
        else:
            self._trainer._total_loss_scalar = self._total_loss
            self._trainer._tr_loss.zero_()


class SaveAtBoundaries(TrainerCallback):
    """Holds a checkpoint, or the wish to stop, back until the generation batch at hand is used up.

    The answers in use and their scores are in no checkpoint: a run cut inside a cycle would sample others. To be asked
    after every other callback.
    """

    def __init__(self) -> None:
        self._save_pending = self._stop_pending = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._save_pending = self._stop_pending = False

    def on_step_end(self, args, state, control, **kwargs):
        save, stop = self._save_pending or control.should_save, self._stop_pending or control.should_training_stop
        inside = is_inside_cycle(args, state)
        self._save_pending, self._stop_pending = inside and save, inside and stop
        control.should_save, control.should_training_stop = save and not inside, stop and not inside

    on_log = on_step_end  # of the same step, before it would be saved


def is_inside_cycle(args, state) -> bool:
    """Whether the answers of the step that was just made are used again by the next one. Of solutions, none are."""
    cycle = getattr(args, "steps_per_generation", 1) * getattr(args, "num_iterations", 1)
    more = state.global_step * args.gradient_accumulation_steps % cycle != 0
    return more and state.global_step < state.max_steps


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
