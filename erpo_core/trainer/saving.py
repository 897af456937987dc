"""Checkpoints of a trainer: written under another name, whole before they have theirs, rotated, checked at resume."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from erpo_core import checkpoints
from erpo_core.errors import RunError
from erpo_core.trainer.environment import differences, environment
from erpo_core.trainer.randomness import RandomState
from erpo_core.trainer.reference import Reference
from erpo_core.trainer.sampler import EpochSampler
from erpo_core.trainer.sharding import goes_in_step, is_sharded, load_whole_state, whole_state, whole_weights
from erpo_core.trainer.state import RunState

_STAGING = ".saving"
_FULL = 2**20
"""Bytes that are left: what was written last did not fit."""


class WholeCheckpoints:
    """A mixin before transformers' Trainer, which writes in place and resumes from the highest number."""

    args: Any
    state: Any
    accelerator: Accelerator
    model: Any
    is_fsdp_enabled: bool
    run_state: RunState
    tell_removed: Callable[[int, Path], None] | None = None
    """Told the step and the folder of each checkpoint that made room for later ones."""
    changed_environment: dict[str, tuple[Any, Any]]
    """{name: (at the checkpoint, now)} of libraries, device and threads, where a run resumed from another one."""
    _reference: Reference
    _policy: Any
    _order: EpochSampler | None = None
    """That of the prompts; None where it is transformers' own."""
    _counted_at: float
    _random: tuple[int, RandomState] | None = None
    """The last step that was made to its end, and the random states between it and the next one."""

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As transformers' Trainer; ``True`` resumes from the newest checkpoint that is whole, if there is one.

        Raises:
            RunError: ``checkpoint_damaged``, or ``base_weights_changed``.
            OSError: the checkpoint cannot be read just now.
        """
        folder = resume_from_checkpoint
        if folder is True:
            folder = checkpoints.newest_whole(Path(self.args.output_dir))
        elif folder and not checkpoints.is_whole(Path(folder)):
            raise RunError(f"the checkpoint {Path(folder).name} is damaged", code="checkpoint_damaged")
        self.changed_environment, self._counted_at, self._random = {}, time.monotonic(), None
        self.run_state.environment = environment() | {"dtype": str(next(self._policy.parameters()).dtype)}
        self.run_state.base_fingerprint = self._reference.fingerprint(self._policy)
        if folder and self.is_fsdp_enabled:
            self._load_whole_weights(str(folder))
        return super().train(resume_from_checkpoint=str(folder) if folder else None, **kwargs)

    def _get_output_dir(self, trial) -> str:
        return str(Path(super()._get_output_dir(trial)) / _STAGING)

    def _save_checkpoint(self, model, trial) -> None:
        """Written beside the others under another name, then named: a kill in between leaves no half checkpoint."""
        self._check_base()
        staging, step = Path(self._get_output_dir(trial)), self.state.global_step
        if self.is_world_process_zero():
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with _telling_a_full_disk(staging, step):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self._publish(staging, step)

    def _publish(self, staging: Path, step: int) -> None:
        written = checkpoints.checkpoint_folder(staging, step)
        reward = next((entry["reward"] for entry in reversed(self.state.log_history) if "reward" in entry), None)
        self.run_state.checkpoint_rewards[str(step)] = float("-inf") if reward is None else reward
        self.count_seconds()
        self.run_state.save(written)
        published = checkpoints.checkpoint_folder(staging.parent, step)
        checkpoints.publish(written, published, step)
        shutil.rmtree(staging, ignore_errors=True)
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(published))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not before it has its name: transformers uploads in a thread, which would find the folder gone."""

    def rotate_checkpoints(self) -> None:
        """Delete what is over ``save_total_limit``, once the newest has been announced. By the first process."""
        parent, step = Path(self.args.output_dir), self.state.global_step
        best = self.run_state.best_checkpoint([one for one in checkpoints.list_steps(parent) if one <= step])
        for removed in checkpoints.rotate(parent, self.args.save_total_limit, best=best, newest=step):
            if self.tell_removed is not None:
                self.tell_removed(removed, checkpoints.checkpoint_folder(parent, removed))

    def count_seconds(self) -> float:
        """How long the run has been training, over all attempts, up to now."""
        now = time.monotonic()
        self.run_state.seconds += now - self._counted_at
        self._counted_at = now
        return self.run_state.seconds

    def save_now(self) -> None:
        """A checkpoint of the step that the run is at, where there is none. Not within a cycle of several updates.

        It holds nothing of the step that is under way: that one will draw again what it has drawn.
        """
        if not checkpoints.checkpoint_folder(Path(self.args.output_dir), self.state.global_step).exists():
            # Of the step that is under way some answers may be counted.
            counts = (logs["num_tokens"] for logs in reversed(self.state.log_history) if "num_tokens" in logs)
            self.state.num_input_tokens_seen = int(next(counts, 0))
            step, random = self._random or (None, None)
            with random.restored() if step == self.state.global_step else nullcontext():
                self._save_checkpoint(self.model_wrapped, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """The end of a step: what is drawn from now on belongs to the next one."""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._random = (self.state.global_step, RandomState.current())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers' Trainer; sharded weights are written whole, the same files as without shards."""
        if not is_sharded(self.model):
            super().save_model(output_dir, _internal_call)
            return
        weights = whole_weights(self.model, keep=self.args.should_save)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not goes_in_step(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_state(self.optimizer, keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_whole_weights(self, folder: str) -> None:
        """Before they are sharded: what a checkpoint holds is whole."""
        self.is_fsdp_enabled = False
        try:
            self._load_from_checkpoint(folder)
        finally:
            self.is_fsdp_enabled = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            return
        if isinstance(self._policy, PeftModel):
            # Where there is a second adapter, the reference, transformers would load that one alone.
            self._policy.load_adapter(resume_from_checkpoint, "default", is_trainable=True)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _run_epoch(self, **kwargs) -> None:
        """transformers' loop would make one step more of a run that is resumed from its last."""
        if self._order is not None:
            self._order.set_epoch(kwargs["epoch"])
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if self.args.device.type == "cpu":
            # On several ranks accelerate calls it cpu:0, a place that torch.load does not know.
            vars(self.args)["_setup_devices"] = torch.device("cpu")
        if checkpoint is not None and goes_in_step(self.model):
            state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
            load_whole_state(self.model, self.optimizer, state)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            now, self.run_state = self.run_state.environment, RunState.load(Path(checkpoint))
            self.changed_environment = differences(self.run_state.environment, now)
            self.run_state.environment = now
            if None not in self.changed_environment.get("dtype", (None,)):
                self.run_state.base_fingerprint = self._reference.fingerprint(self._policy)  # other bits, other weights
            self._check_base()

    def _check_base(self) -> None:
        """The reference's weights are those that training started from; anything else makes the signal another."""
        found = self._reference.fingerprint(self._policy)
        if self.run_state.base_fingerprint not in (None, found):
            raise RunError(
                f"step {self.state.global_step}: the frozen weights are not those that training started from",
                code="base_weights_changed",
            )


class RotateCheckpoints(TrainerCallback):
    """Makes room after a save. To be added after whatever announces checkpoints."""

    def __init__(self, trainer: WholeCheckpoints) -> None:
        self._trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self._trainer.rotate_checkpoints()


@contextmanager
def _telling_a_full_disk(staging: Path, step: int) -> Iterator[None]:
    """Libraries say it in many ways, or not at all. What did not fit goes, so that the disk can be written again."""
    try:
        yield
    except Exception as error:
        place = next(folder for folder in staging.parents if folder.exists())
        if shutil.disk_usage(place).free > _FULL:
            raise
        shutil.rmtree(staging, ignore_errors=True)
        raise RunError(
            f"the disk of the run's folder is full: the checkpoint of step {step} was not written, those before it are "
            "whole; free some space and retry the job",
            code="disk_full",
        ) from error
