"""Whether an engine samples from the policy, by what it says of a fixed text."""

from typing import Any

import torch
from torch import Tensor

from erpo_core.errors import RunError
from erpo_core.trainer.scoring import pad_rollouts, score_rollouts

_MOST_APART = 0.1
"""Nats a token, on average, between vLLM and the policy: bfloat16 gives about a tenth of it."""


class Probe:
    """A fixed text: what an engine says of it is compared with what the policy says, and with what was sent before. All
    ranks must use it together."""

    def __init__(self, engine: Any, ids: list[int]) -> None:
        self._engine = engine
        self._ids = ids[: engine.max_model_len - 1]
        self._others: dict[str, Tensor] = {}
        """What the engine would say if it held something else."""

    def remember(self, policy: Any, name: str) -> None:
        """Answers like this one's are that one's."""
        self._others[name] = self._logps(policy)

    def check(self, policy: Any, what: str, otherwise: str = "the engine's precision is too low") -> None:
        """
        Args:
            what: That the engine should hold.
            otherwise: What is wrong, or to be done, where it holds nothing that is known.

        Raises:
            RunError: ``stale_adapter``: it holds something else.
        """
        ours, theirs = self._logps(policy), torch.tensor(self._engine.prompt_logps(self._ids))
        apart = _apart(theirs, ours)
        for name, other in self._others.items():
            nearer = _apart(theirs, other)
            if nearer < apart and _apart(ours, other) > 2 * nearer:
                raise RunError(
                    f"vLLM answers as {name} does, not as {what} (log-probabilities of a fixed text: {nearer:.2g} and "
                    f"{apart:.2g} nats apart)",
                    code="stale_adapter",
                )
        if not apart <= _MOST_APART:
            raise RunError(
                f"vLLM does not answer as {what}: on a fixed text its log-probabilities are {apart:.2g} nats from the "
                f"policy's, more than {_MOST_APART}; {otherwise}",
                code="stale_adapter",
            )
        self._others["the version before"] = ours

    @torch.no_grad()
    def _logps(self, policy: Any) -> Tensor:
        """(text - 1,) at temperature 1, on the CPU."""
        rollouts = pad_rollouts([self._ids[:1]], [self._ids[1:]], 0, policy.device)
        training = policy.training
        policy.eval()
        found = score_rollouts(policy, rollouts, temperature=1.0).logps.cpu()
        policy.train(training)
        return found


def _apart(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().mean().item()
