"""An engine for the model that a job names, with what :func:`erpo_core.models.load_policy` says of the model."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from erpo_core.generation.base import Engine
from erpo_core.job import JobInputs
from erpo_core.models import adapter_folder, default_device, default_dtype, load_policy, policy_info

BATCH_SIZES = {("transformers", "cpu"): 32, ("transformers", "cuda"): 32, ("vllm", "cpu"): 128, ("vllm", "cuda"): 2048}
"""Answers to sample in one call where a request does not say."""


@contextmanager
def open_transformers(inputs: JobInputs, *, dtype: Any) -> Iterator[tuple[Engine, dict[str, Any]]]:
    """The transformers engine; in float32 an adapter is merged into the copy in memory: as exact, and faster."""
    from erpo_core.generation.transformers import TransformersEngine

    model, tokenizer, info = load_policy(inputs, dtype=dtype)
    if inputs.model.adapter_path is not None and info["dtype"] == "float32":
        model = model.merge_and_unload()
    yield TransformersEngine(model, tokenizer), info


@contextmanager
def open_vllm(
    inputs: JobInputs, path: Path, *, dtype: Any, max_model_len: int, num_gpus: int
) -> Iterator[tuple[Engine, dict[str, Any]]]:
    """vLLM on the model folder ``path``; an adapter is served by vLLM's LoRA support, the base stays what it is.

    Raises:
        RunError: see :class:`erpo_core.generation.vllm.VLLMEngine`.
    """
    from erpo_core.generation.vllm import VLLMEngine

    device = default_device()
    dtype = dtype or default_dtype(device)
    adapter = adapter_folder(inputs)
    engine = VLLMEngine(
        path,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=max_model_len,
        max_lora_rank=_rank(adapter) if adapter else None,
        tensor_parallel_size=max(1, num_gpus) if device == "cuda" else 1,
    )
    try:
        if adapter is not None:
            engine.load_adapter(adapter)
        yield engine, policy_info(inputs, path, dtype=dtype, device=device)
    finally:
        engine.close()


def _rank(adapter: Path) -> int:
    return json.loads((adapter / "adapter_config.json").read_text())["r"]
