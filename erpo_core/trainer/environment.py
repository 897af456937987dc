"""What decides the last bits of a training beside its order: libraries, machine, threads."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "vllm")


def environment() -> dict[str, Any]:
    """``versions`` by library, ``device`` by its name, a CPU's with its instruction set, and ``num_threads``."""
    cpu = f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
    return {
        "versions": {"python": platform.python_version()} | dict(_installed()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "num_threads": torch.get_num_threads(),
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{name: (before, now)} of what is not the same, None where one has it not; {} where ``before`` tells nothing."""
    if not before:
        return {}
    one, two = _flat(before), _flat(now)
    names = sorted(one.keys() | two.keys())
    return {name: (one.get(name), two.get(name)) for name in names if one.get(name) != two.get(name)}


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "versions"} | values["versions"]


def _installed():
    for name in _LIBRARIES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue
