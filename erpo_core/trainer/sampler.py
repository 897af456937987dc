"""The order of the prompts."""

from trl.trainer.utils import RepeatSampler

_EPOCHS_APART = 1_000_003


class EpochSampler(RepeatSampler):
    """TRL's order of prompts, drawn anew for each epoch from (seed, epoch) alone.

    TRL's own sampler draws from a generator that no checkpoint keeps: a run resumed in its second epoch would see the
    first epoch's order again.
    """

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """To be called before each epoch, also the one that a resumed run starts in.

        On several ranks transformers and accelerate do not find this sampler below their wrappers in a resumed epoch.
        """
        self.epoch = epoch

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + _EPOCHS_APART * self.epoch)
        return super().__iter__()
