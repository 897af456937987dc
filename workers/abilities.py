"""What this worker's jobs may use, found without loading anything heavy."""

import importlib.util
import os
from pathlib import Path

_PACKAGES = ("bitsandbytes", "deepspeed", "vllm")
_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/proc/driver/nvidia/version", "/dev/dxg", "/dev/kfd")
"""Of the drivers of NVIDIA, of WSL, of AMD."""


def abilities() -> list[str]:
    """``cuda`` where a driver has a device to show, and each optional package that is installed."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    has_device = not hidden and any(Path(path).exists() for path in _DEVICES)
    return ["cuda"] * has_device + [name for name in _PACKAGES if importlib.util.find_spec(name)]
