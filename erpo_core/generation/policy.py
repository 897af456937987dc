"""An engine for a base model and the adapters that a job puts on it, one at a time."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from erpo_core.generation.base import Engine
from erpo_core.models import load_model

BATCH_SIZES = {("transformers", "cpu"): 32, ("transformers", "cuda"): 32, ("vllm", "cpu"): 128, ("vllm", "cuda"): 2048}
"""Answers to sample in one call where a request does not say."""


class AdapterEngine(Engine, Protocol):
    """Samples from a base model with one adapter at a time on it, or none."""

    def load_adapter(self, folder: Path) -> None:
        """Answers come from the base with this adapter on, from now on."""
        ...

    def drop_adapter(self) -> None:
        """Answers come from the base model again."""
        ...


@contextmanager
def open_transformers(
    path: Path, *, dtype: Any, device: str, adapters: Sequence[Path | None]
) -> Iterator[AdapterEngine]:
    """The transformers engine on the model folder ``path``; ``adapters``: what will be on it, one after the other."""
    from erpo_core.generation.adapted import AdaptedEngine

    yield AdaptedEngine(*load_model(path, dtype=dtype, device=device), keeps_base=len(adapters) > 1)


@contextmanager
def open_vllm(
    path: Path, *, dtype: Any, device: str, max_model_len: int, num_gpus: int, adapters: Sequence[Path | None]
) -> Iterator[AdapterEngine]:
    """vLLM on the model folder ``path``; adapters are served by vLLM's LoRA support, the base stays what it is.

    Raises:
        RunError: see :class:`erpo_core.generation.vllm.VLLMEngine`.
    """
    from erpo_core.generation.vllm import VLLMEngine

    engine = VLLMEngine(
        path,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=max_model_len,
        max_lora_rank=max(map(_rank, filter(None, adapters)), default=None),
        tensor_parallel_size=max(1, num_gpus) if device == "cuda" else 1,
    )
    try:
        yield engine
    finally:
        engine.close()


def _rank(adapter: Path) -> int:
    return json.loads((adapter / "adapter_config.json").read_text())["r"]
