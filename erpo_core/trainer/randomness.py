"""The states of the global random generators, to be gone back to."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class RandomState:
    """Those of Python, NumPy, torch, and each CUDA device that this process sees: what transformers saves."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: list[torch.Tensor]

    @classmethod
    def current(cls) -> "RandomState":
        """As they are now; without CUDA's where nothing has used it."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Make them as they were."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        torch.cuda.set_rng_state_all(self.cuda)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """As they were, for a while: afterwards the generators go on from where they are now."""
        now = RandomState.current()
        self.restore()
        try:
            yield
        finally:
            now.restore()
