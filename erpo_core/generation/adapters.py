"""LoRA adapters on their way into an engine: what they are known by."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def digest_of(tensors: Iterable[Tensor]) -> str:
    """sha256 over the set of tensors: shapes, dtypes and bytes, whatever they are called and in whatever order.

    Engines rename and regroup the matrices of an adapter, but they keep each of them.
    """
    parts = sorted(_tensor_digest(tensor) for tensor in tensors)
    return hashlib.sha256(b"".join(parts)).hexdigest()


def scaled_pairs(pairs: Iterable[tuple[Tensor, Tensor, float]], dtype: torch.dtype) -> Iterable[Tensor]:
    """The matrices of (A, B, scale) as an engine of this dtype holds them: both cast, then B times the scale."""
    for down, up, scale in pairs:
        yield down.detach().to(dtype)
        up = up.detach().to(dtype)
        yield up if scale == 1 else up * scale


def _tensor_digest(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype}{tuple(plain.shape)}".encode())
    digest.update(plain.view(torch.uint8).numpy().data)
    return digest.digest()
