"""One pydantic model per job kind: the request body, what is stored, and what the child reads are the same thing."""

from typing import Any, Literal

from pydantic import TypeAdapter

from erpo_core.specs.common import Spec
from erpo_core.specs.entropy import EntropySpec
from erpo_core.specs.evaluate import EvaluateSpec
from erpo_core.specs.train import ErpoTrainSpec, GrpoTrainSpec, TrainSpec

JobKind = Literal["train", "evaluate", "entropy"]
SPECS: dict[JobKind, TypeAdapter] = {
    "train": TypeAdapter(TrainSpec),
    "evaluate": TypeAdapter(EvaluateSpec),
    "entropy": TypeAdapter(EntropySpec),
}

__all__ = [
    "SPECS",
    "EntropySpec",
    "ErpoTrainSpec",
    "EvaluateSpec",
    "GrpoTrainSpec",
    "JobKind",
    "Spec",
    "TrainSpec",
    "parse_spec",
]


def parse_spec(kind: JobKind, body: dict[str, Any]) -> Any:
    """Validate a stored or received body.

    Raises:
        pydantic.ValidationError: naming each wrong field.
    """
    return SPECS[kind].validate_python(body)
