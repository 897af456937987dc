"""Perturbation of right answers."""

from typing import Any

from erpo_core.job import JobInputs, Stop
from erpo_core.records import Sink


def run(spec: Any, inputs: JobInputs, sink: Sink, stop: Stop) -> dict[str, Any]:
    """Disturb right answers at chosen tokens, continue and check them."""
    from erpo_core.analysis.perturbation import run_perturbation

    return run_perturbation(spec, inputs, sink, stop)
