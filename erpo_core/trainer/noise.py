"""How much of the progress signal is rounding."""

from collections.abc import Callable

import torch
from torch import Tensor

from erpo_core.trainer.scoring import Rollouts


def measure_noise(
    score: Callable[[Rollouts], Tensor], group: Rollouts, logps: Tensor, *, in_step: bool = False
) -> float:
    """Standard deviation, nats, of what differs when the same tokens are scored fewer responses at a time.

    Never measured on the progress itself, which is exactly 0 for a fresh adapter. A difference of exactly 0 means that
    both shapes met the same kernel; then a smaller part is tried.

    Args:
        score: Log-probabilities (N,) of the active tokens of some responses.
        group: Responses to one prompt.
        logps: (N,), theirs, scored as the training step scores them; 0 where there are none.
        in_step: Call ``score`` as often whatever is found: ranks that share their weights must call it together, each
            for as many responses.
    """
    size = group.num_generations
    found = 0.0
    for part in sorted({max(1, size // 2), max(1, size // 4), 1}, reverse=True):
        if not in_step and (found or not len(logps)):
            break
        apart = [score(group.part(start, min(start + part, size))) for start in range(0, size, part)]
        if len(logps):
            found = found or (torch.cat(apart) - logps).std(correction=0).item()
    return found
