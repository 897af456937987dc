"""Evaluation."""

from typing import Any

from erpo_core.job import JobInputs, Stop
from erpo_core.records import Sink


def run(spec: Any, inputs: JobInputs, sink: Sink, stop: Stop) -> dict[str, Any]:
    """Sample answers to the problems of a benchmark, check and count them."""
    from erpo_core.evaluation import run_evaluation

    return run_evaluation(spec, inputs, sink, stop)
