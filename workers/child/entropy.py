"""Entropy analysis."""

from typing import Any

from erpo_core.job import JobInputs, Stop
from erpo_core.records import Sink


def run(spec: Any, inputs: JobInputs, sink: Sink, stop: Stop) -> dict[str, Any]:
    """Score the tokens of texts or of sampled answers."""
    from erpo_core.analysis.entropy import run_entropy

    return run_entropy(spec, inputs, sink, stop)
