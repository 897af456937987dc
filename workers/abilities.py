"""What this worker's jobs may use, found without loading anything heavy."""

import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("bitsandbytes", "deepspeed", "vllm")
_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/proc/driver/nvidia/version", "/dev/dxg", "/dev/kfd")
"""Of the drivers of NVIDIA, of WSL, of AMD."""


def abilities() -> list[str]:
    """``cuda`` where a driver has a device to show, ``cuda:N`` where it is known that there are N, and each optional
    package that is installed."""
    return _devices() + [name for name in _PACKAGES if importlib.util.find_spec(name)]


def _devices() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1") or _is_torch_for_cpus() or not any(Path(path).exists() for path in _DEVICES):
        return []
    count = _count_devices()
    if visible is not None:
        count = min(count, len(visible.split(",")))
    return ["cuda", f"cuda:{count}"] if count else ["cuda"]


def _count_devices() -> int:
    """NVIDIA's; 0 where the driver has no file for each, as on WSL."""
    return sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))


def _is_torch_for_cpus() -> bool:
    try:
        return version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False
