"""The body of `POST /analyze/branch`."""

from pydantic import Field

from erpo_core.specs.common import HardwareSpec, JobOptions, ModelRef, OneDevice, SamplingSpec, Spec, Text


class BranchSpec(Spec):
    """What if it had said something else here? The likeliest tokens at one place, each continued and checked."""

    model: ModelRef
    sequence: str = Field(pattern=r"^seq_[0-9a-f]{32}$", description="A stored sequence: `id` of a trace.")
    position: int = Field(ge=0, le=2**31 - 1, description="Token of its answer, from 0, that is replaced.")
    num_alternatives: int = Field(5, ge=1, le=50, description="Likeliest tokens; the written one is always added.")
    num_continuations: int = Field(8, ge=1, le=256, description="Continuations of each.")
    gold: Text | None = Field(None, description="Right answer, in place of the one stored with the sequence.")
    sampling: SamplingSpec = SamplingSpec()
    temperature: float = Field(1.0, gt=0, le=10, description="Of the distribution that alternatives are ranked by.")
    batch_size: int = Field(64, ge=1, le=4096, description="Sequences decoded together.")
    bf16: bool | None = Field(None, description="null: float32 on the CPU, bfloat16 on CUDA.")
    hardware: OneDevice = HardwareSpec()
    job: JobOptions = JobOptions()
