"""Shared by the benchmarks: ratios with intervals, peak memory, the machine's description, and RESULTS.md."""

import platform
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

RESULTS = Path(__file__).with_name("RESULTS.md")
_VERSIONS = ("torch", "transformers", "trl", "peft")


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


def ratio(pairs: Sequence[tuple[float, float]], seed: int = 0) -> str:
    """Median of the pairs' ratios with a 95% bootstrap interval over pairs."""
    ratios = np.array([top / bottom for top, bottom in pairs])
    draws = np.random.default_rng(seed).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return f"{np.median(ratios):.3f} [{low:.3f}, {high:.3f}]"


def synced(start: float) -> float:
    """Seconds since ``start``, the device's queue included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class PeakMemory:
    """Bytes at the peak above the start: of the device on CUDA, resident memory of the process elsewhere."""

    bytes_above_start = 0

    def __enter__(self) -> "PeakMemory":
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self._start = _status("VmRSS")
        return self

    def __exit__(self, *_) -> None:
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")
        self.bytes_above_start = peak - self._start


def _status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024


def machine() -> str:
    """One line: what was measured on."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        device = f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{name} {version(name)}" for name in _VERSIONS)
    return f"{datetime.now(UTC):%Y-%m-%d}, {device}; {versions}"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a safetensors folder, from its package."""
    from erpo_core.models import prepare_model

    cache = Path.home() / ".cache" / "erpo-lab"
    return prepare_model("smollm2-135m", cache_dir=cache, model_roots=())


def write_section(title: str, how: str, body: str) -> None:
    """Put a section into RESULTS.md in place of the one of that title."""
    text = (
        RESULTS.read_text() if RESULTS.exists() else "# Measured\n\nEach section names its script, machine and date.\n"
    )
    section = f"## {title}\n\n{machine()}.\n\n```\n{how.strip()}\n```\n\n{body.strip()}\n"
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    text = pattern.sub(lambda _: section + "\n", text) if pattern.search(text) else f"{text.rstrip()}\n\n{section}"
    RESULTS.write_text(text.rstrip() + "\n")
