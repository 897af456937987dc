"""What a run has measured and counted so far; a resumed run reads it from its checkpoint."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

FILE_NAME = "erpo_state.json"


@dataclass
class RunState:
    """``noise``: std of the rounding in the progress signal. ``noise_step``: when it was measured.
    ``entropy_mean``, ``entropy_second``: the running moments of the entropy, None before the first step.
    ``skipped_steps``: steps without an update. ``base_fingerprint``: of the reference's weights.
    ``checkpoint_rewards``: {step: reward}. ``environment``: libraries, device and threads. ``evaluated_step``: the last
    one whose policy was evaluated. ``seconds``: of training, all attempts together."""

    noise: float = 0.0
    noise_step: int | None = None
    entropy_mean: float | None = None
    entropy_second: float | None = None
    skipped_steps: int = 0
    base_fingerprint: str | None = None
    checkpoint_rewards: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    evaluated_step: int | None = None
    seconds: float = 0.0

    @property
    def entropy_std(self) -> float | None:
        """None before the first step."""
        if self.entropy_mean is None:
            return None
        return max(self.entropy_second - self.entropy_mean**2, 0.0) ** 0.5

    def update_entropy(self, mean: float, second: float, decay: float) -> None:
        """Fold in one step's mean and second moment; the first step's are taken as they are."""
        if self.entropy_mean is None:
            self.entropy_mean, self.entropy_second = mean, second
        self.entropy_mean = decay * self.entropy_mean + (1 - decay) * mean
        self.entropy_second = decay * self.entropy_second + (1 - decay) * second

    def best_checkpoint(self, steps: Sequence[int]) -> int | None:
        """The step of highest reward, the earliest of equals; None where no step has one."""
        rewards = {step: self.checkpoint_rewards.get(str(step), float("-inf")) for step in steps}
        rewarded = [step for step in steps if rewards[step] > float("-inf")]
        return max(rewarded, key=rewards.__getitem__, default=None)

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        (folder / FILE_NAME).write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> "RunState":
        """That of a checkpoint, as far as this version knows it; a fresh one where the checkpoint has none."""
        path = folder / FILE_NAME
        stored = json.loads(path.read_text()) if path.is_file() else {}
        known = {one.name for one in fields(cls)}
        return cls(**{name: value for name, value in stored.items() if name in known})
