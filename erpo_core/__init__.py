"""ERPO: the maths, the trainer, rewards, generation, evaluation and entropy analysis.

Public names are resolved on first use, so that ``import erpo_core`` stays free of torch.
"""

from importlib import import_module

_HOMES = {
    "ERPOConfig": "erpo_core.trainer.config",
    "ERPOSignals": "erpo_core.advantages",
    "ERPOTrainer": "erpo_core.trainer.trainer",
    "erpo_advantages": "erpo_core.advantages",
}

__all__ = ["ERPOConfig", "ERPOSignals", "ERPOTrainer", "erpo_advantages"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
