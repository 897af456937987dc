"""Tests with the real vLLM, which `make test-vllm` installs; elsewhere they are skipped."""

import importlib.util
from pathlib import Path

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]


@pytest.fixture(scope="session")
def smollm2(model_cache) -> Path:
    """SmolLM2-135M-Instruct as safetensors."""
    from erpo_core.models import prepare_model

    return prepare_model("smollm2-135m", cache_dir=model_cache)
