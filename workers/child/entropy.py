"""Entropy analysis."""

from typing import Any

from erpo_core.job import JobInputs, Stop
from erpo_core.records import Sink


def run(spec: Any, inputs: JobInputs, sink: Sink, stop: Stop) -> dict[str, Any]:
    """Score the tokens of texts or of sampled answers, or bound their entropies by log-probabilities that are given."""
    if spec.logprobs is not None:
        from erpo_core.analysis.given_logprobs import run_given_logprobs

        return run_given_logprobs(spec, inputs, sink, stop)
    from erpo_core.analysis.entropy import run_entropy

    return run_entropy(spec, inputs, sink, stop)
