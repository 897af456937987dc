"""Two callbacks that every ERPOTrainer has: no step on a gradient that is not finite, no checkpoint inside a cycle."""

from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

from erpo_core.errors import RunError
from erpo_core.trainer.ranks import gather_list, total_of
from erpo_core.trainer.sharding import gradients, local

if TYPE_CHECKING:
    from erpo_core.trainer.trainer import ERPOTrainer


class SkipNonFinite(TrainerCallback):
    """A step whose gradient is not finite is skipped and counted; after ``max_skipped_steps`` the job fails.

    Raises:
        RunError: ``nonfinite_loss``.
    """

    def __init__(self, trainer: "ERPOTrainer") -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = gradients(model)
        norms = [gradient.float().norm() for gradient in found.values()]
        fine = not norms or bool(torch.isfinite(torch.stack(norms).sum()))
        accelerator = self._trainer.accelerator
        if not total_of(accelerator, [float(not fine)])[0]:
            return
        # Each rank may see other gradients, or parts of them.
        names = set(gather_list(accelerator, [name for name, gradient in found.items() if not _finite(gradient)]))
        bad = [name for name, _ in model.named_parameters() if name in names]
        # The optimizer leaves parameters without a gradient as they are, its moments and weight decay included;
        # DeepSpeed's drops such a gradient by itself.
        model.zero_grad(set_to_none=True)
        self._trainer.run_state.skipped_steps += 1
        if self._trainer.run_state.skipped_steps > args.max_skipped_steps:
            weights = [name for name, p in model.named_parameters() if p.requires_grad and not _finite(local(p))]
            raise RunError(
                f"{self._trainer.run_state.skipped_steps} steps had a gradient that is not finite, the last one step "
                f"{state.global_step + 1}: {len(bad)} gradients, first {', '.join(bad[:3])}; "
                f"weights that are not finite: {', '.join(weights[:3]) or 'none'}",
                code="nonfinite_loss",
            )


class SaveAtBoundaries(TrainerCallback):
    """Holds a checkpoint, or the wish to stop, back until the generation batch at hand is used up.

    The answers in use and their scores are in no checkpoint: a run cut inside a cycle would sample others.
    """

    def __init__(self) -> None:
        self._save_pending = False

    def on_step_end(self, args, state, control, **kwargs):
        if is_inside_cycle(args, state):
            self._save_pending = self._save_pending or control.should_save
            control.should_save = False
            control.should_training_stop = False
        elif self._save_pending:
            control.should_save, self._save_pending = True, False


def is_inside_cycle(args, state) -> bool:
    """Whether the answers of the step that was just made are used again by the next one. Of solutions, none are."""
    cycle = getattr(args, "steps_per_generation", 1) * getattr(args, "num_iterations", 1)
    more = state.global_step * args.gradient_accumulation_steps % cycle != 0
    return more and state.global_step < state.max_steps


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
