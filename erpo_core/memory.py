"""How large a model is, and roughly what memory its training takes, before anything is loaded. Nothing heavy."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erpo_core.models import KNOWN_MODELS
from erpo_core.specs.common import LoraSpec
from erpo_core.specs.train import BaseTrainSpec, GrpoTrainSpec

SMALL_MODEL = 500_000_000
"""Parameters up to which ``scoring_dtype="auto"`` and an analysis of entropies are float32."""
_SIZE_IN_NAME = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)([BM])(?![A-Za-z0-9])", re.IGNORECASE)
MICRO_BATCH_TOKENS = 2**13
"""Sampled tokens up to which groups share a micro-batch on CUDA: shorter ones wait for launches."""
CPU_MICRO_BATCH_TOKENS = 2**16
"""Tokens of a micro-batch at most on a CPU: where it fits, one for the whole share wastes the least time."""
_SOLUTIONS = 4
"""Of a micro-batch on CUDA, at most."""
_GRADIENT_AND_ADAM_BYTES = 12
_ZERO_COPY_BYTES = 4
"""DeepSpeed's own copy of what is trained, in parts."""
_BYTES_IN_4BIT = 0.75
"""A parameter; embeddings, head and norms are not in 4 bits."""
_ACTIVATION_BYTES = 34
"""In 16 bits a token, layer and unit of hidden size, with fused attention (arXiv 2205.05198, section 4.1)."""


@dataclass(frozen=True)
class ModelShape:
    """Of a decoder, from its ``config.json``. ``kv_size``: key-value heads x head size."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    kv_size: int


@dataclass(frozen=True)
class ModelSize:
    """``shape`` is None where only the number of parameters is known."""

    num_parameters: int
    shape: ModelShape | None = None


_SMOLLM2 = ModelShape(hidden_size=576, intermediate_size=1536, num_layers=30, kv_size=192)
_QWEN2_5 = {
    "1.5B": ModelSize(1_543_714_304, ModelShape(hidden_size=1536, intermediate_size=8960, num_layers=28, kv_size=256)),
    "3B": ModelSize(3_085_938_688, ModelShape(hidden_size=2048, intermediate_size=11_008, num_layers=36, kv_size=256)),
    "7B": ModelSize(7_615_616_512, ModelShape(hidden_size=3584, intermediate_size=18_944, num_layers=28, kv_size=512)),
}
_KNOWN_SIZES = {
    "smollm2-135m": ModelSize(KNOWN_MODELS["smollm2-135m"]["num_parameters"], _SMOLLM2),
    **{f"Qwen/Qwen2.5-{name}{end}": size for name, size in _QWEN2_5.items() for end in ("", "-Instruct")},
    **{f"Qwen/Qwen2.5-Math-{name}{end}": _QWEN2_5[name] for name in ("1.5B", "7B") for end in ("", "-Instruct")},
}
"""By reference, at any commit: nothing is fetched for an estimate."""


def model_size(ref: Any, model_roots: Iterable[Path] = ()) -> ModelSize | None:
    """The size of a model by its reference: registered, a folder, or a hub id that is known or says it (``org/x-7B``).

    None where that is not known, as for checkpoints of runs and folders outside the allowed roots.
    """
    if not isinstance(ref, str):
        return None
    if known := _KNOWN_SIZES.get(ref.partition("@")[0]):
        return known
    if ref in KNOWN_MODELS:
        return ModelSize(KNOWN_MODELS[ref]["num_parameters"])
    if ref.startswith(("/", ".", "~")):
        folder = Path(ref).expanduser().resolve()
        allowed = any(folder.is_relative_to(Path(root).resolve()) for root in model_roots)
        return ModelSize(count_parameters(folder), _shape(folder)) if allowed else None
    found = _SIZE_IN_NAME.search(ref.replace("-", " ").replace("/", " "))
    return ModelSize(round(float(found[1]) * (1e9 if found[2] in "bB" else 1e6))) if found else None


def count_parameters(folder: Path) -> int:
    """By the headers of the folder's safetensors files; nothing of the weights is read."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        count += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return count


def training_memory(spec: BaseTrainSpec, size: ModelSize) -> dict[str, int | None]:
    """Bytes on one CUDA device, and in sum on a CPU, where everything is float32 and micro-batches are larger.

    Returns:
        ``num_parameters``; ``weights_bytes``, a frozen reference included: the policy's are whole to sample from,
        however they are sharded, and adapters where the model's shape is known; ``optimizer_bytes``, gradients and
        Adam's moments; ``kv_cache_bytes``; ``activation_bytes``; ``memory_bytes``, their sum; ``cpu_memory_bytes``,
        that of a process on a CPU, where it can run there. What depends on a shape that is not known is None, and so
        are the sums.
    """
    parts = _parts(spec, size, on_cuda=True)
    on_a_cpu = None if spec.load_in_4bit else _sum(_parts(spec, size, on_cuda=False))
    return {
        "num_parameters": size.num_parameters,
        **parts,
        "memory_bytes": _sum(parts),
        "cpu_memory_bytes": on_a_cpu,
    }


def rows_of_micro_batch(spec: BaseTrainSpec, *, on_cuda: bool) -> int:
    """Sequences that one device scores at a time.

    Answers: whole groups where they fit, and never less on CUDA, since a group that is cut is scored once more.
    """
    devices = max(1, spec.hardware.num_gpus)
    if not isinstance(spec, GrpoTrainSpec):
        most = _SOLUTIONS if on_cuda else CPU_MICRO_BATCH_TOKENS // spec.max_length
        return _largest_part(spec.train_batch_size // devices, most)
    share = spec.generation_batch_size // devices
    group = math.gcd(spec.num_generations, share)
    length = spec.max_completion_length or spec.max_length
    most = (MICRO_BATCH_TOKENS if on_cuda else CPU_MICRO_BATCH_TOKENS) // length
    if on_cuda or group <= most:
        return group * _largest_part(share // group, most // group)
    return _largest_part(share, most)


def _largest_part(whole: int, most: int) -> int:
    """The largest number up to ``most`` that divides ``whole``; 1 at least."""
    return max(n for n in range(1, max(1, min(whole, most)) + 1) if whole % n == 0)


def _sum(parts: dict[str, int | None]) -> int | None:
    known = [part for part in parts.values() if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _parts(spec: BaseTrainSpec, size: ModelSize, *, on_cuda: bool) -> dict[str, int | None]:
    in_bf16 = on_cuda and _computes_in_bf16(spec, size)
    width = 2 if in_bf16 and spec.lora is not None else 4
    if spec.load_in_4bit:
        width = _BYTES_IN_4BIT
    devices = max(1, spec.hardware.num_gpus)
    shards = devices if spec.hardware.strategy in ("fsdp2", "zero3") else 1
    samples = isinstance(spec, GrpoTrainSpec)
    copies = (1 if samples else 1 / shards) + (1 / shards if samples and spec.lora is None else 0)
    shape = size.shape
    adapters = None if shape is None or spec.lora is None else _adapter_parameters(spec.lora, shape)
    trained = size.num_parameters if spec.lora is None else adapters
    owners = devices if spec.hardware.is_sharded else 1
    return {
        "weights_bytes": round(size.num_parameters * width * copies) + 4 * (adapters or 0),
        "optimizer_bytes": None if trained is None else trained * _optimizer_bytes(spec) // owners,
        "kv_cache_bytes": None if shape is None else _cache_bytes(spec, shape, in_bf16) // devices,
        "activation_bytes": None if shape is None else _activation_bytes(spec, shape, in_bf16, on_cuda),
    }


def _optimizer_bytes(spec: BaseTrainSpec) -> int:
    """Of one trained parameter."""
    return _GRADIENT_AND_ADAM_BYTES + (_ZERO_COPY_BYTES if spec.hardware.uses_deepspeed else 0)


def _computes_in_bf16(spec: BaseTrainSpec, size: ModelSize) -> bool:
    """Answers are sampled in what they are scored in."""
    scoring = getattr(spec, "scoring_dtype", "bfloat16")
    if scoring == "auto":
        scoring = "float32" if size.num_parameters <= SMALL_MODEL else "bfloat16"
    return spec.bf16 is not False and scoring == "bfloat16"


def _adapter_parameters(lora: LoraSpec, shape: ModelShape) -> int:
    """Of adapters on all linear layers: r (inputs + outputs) each."""
    hidden, middle, kv = shape.hidden_size, shape.intermediate_size, shape.kv_size
    ends = 2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + middle)
    return lora.r * ends * shape.num_layers


def _cache_bytes(spec: BaseTrainSpec, shape: ModelShape, in_bf16: bool) -> int:
    if not isinstance(spec, GrpoTrainSpec):
        return 0
    tokens = spec.generation_batch_size * spec.max_length
    return tokens * 2 * shape.num_layers * shape.kv_size * (2 if in_bf16 else 4)


def _activation_bytes(spec: BaseTrainSpec, shape: ModelShape, in_bf16: bool, on_cuda: bool) -> int:
    """Of one micro-batch: answers, and a prompt with each group of them, or solutions."""
    rows = rows_of_micro_batch(spec, on_cuda=on_cuda)
    if isinstance(spec, GrpoTrainSpec):
        tokens = rows * (spec.max_completion_length or spec.max_length)
        tokens += math.ceil(rows / spec.num_generations) * spec.prompt_room
    else:
        tokens = rows * spec.max_length
    width = 1 if in_bf16 else 2
    layer = tokens * shape.hidden_size * width
    if spec.gradient_checkpointing:
        return layer * (2 * shape.num_layers + _ACTIVATION_BYTES)
    return layer * shape.num_layers * _ACTIVATION_BYTES


def _shape(folder: Path) -> ModelShape | None:
    try:
        config = json.loads((folder / "config.json").read_text())
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head_size = config.get("head_dim") or hidden // heads
        return ModelShape(
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            kv_size=(config.get("num_key_value_heads") or heads) * head_size,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
