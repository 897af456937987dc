"""Branches from one token of a stored sequence."""

from typing import Any

from erpo_core.job import JobInputs, Stop
from erpo_core.records import Sink


def run(spec: Any, inputs: JobInputs, sink: Sink, stop: Stop) -> dict[str, Any]:
    """Continue the alternatives at one place and check where they lead."""
    from erpo_core.analysis.branch import run_branch

    return run_branch(spec, inputs, sink, stop)
