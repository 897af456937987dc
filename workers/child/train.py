"""Training."""

from typing import Any

from erpo_core.job import JobInputs, Stop
from erpo_core.records import Sink


def run(spec: Any, inputs: JobInputs, sink: Sink, stop: Stop) -> dict[str, Any]:
    """Train an adapter (or every weight) by ERPO, GRPO or on solutions."""
    if spec.algorithm == "sft":
        from erpo_core.trainer.sft import run_sft

        return run_sft(spec, inputs, sink, stop)
    from erpo_core.trainer.run import run_training

    return run_training(spec, inputs, sink, stop)
