"""One pydantic model per job kind: the request body, what is stored, and what the child reads are the same thing."""

from typing import Any, Literal

from pydantic import TypeAdapter

from erpo_core.specs.branch import BranchSpec
from erpo_core.specs.common import Spec
from erpo_core.specs.entropy import EntropySpec
from erpo_core.specs.evaluate import EvaluateSpec
from erpo_core.specs.perturbation import PerturbationSpec
from erpo_core.specs.train import ErpoTrainSpec, GrpoTrainSpec, TrainSpec

JobKind = Literal["train", "evaluate", "entropy", "perturbation", "branch"]
SPECS: dict[JobKind, TypeAdapter] = {
    "train": TypeAdapter(TrainSpec),
    "evaluate": TypeAdapter(EvaluateSpec),
    "entropy": TypeAdapter(EntropySpec),
    "perturbation": TypeAdapter(PerturbationSpec),
    "branch": TypeAdapter(BranchSpec),
}

__all__ = [
    "SPECS",
    "BranchSpec",
    "EntropySpec",
    "ErpoTrainSpec",
    "EvaluateSpec",
    "GrpoTrainSpec",
    "JobKind",
    "PerturbationSpec",
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
