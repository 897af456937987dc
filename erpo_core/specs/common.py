"""Parts that several job specifications share. Field names are TRL's, PEFT's and vLLM's own where they have one."""

import re
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import SchemaError

Name = Annotated[str, Field(min_length=1, max_length=200)]
Text = Annotated[str, Field(min_length=1, max_length=200_000)]
LONGEST_ANSWER = 65_536
"""Tokens of one answer that a request may ask for."""
_ALL_LINEAR = "all-linear"
_HEAD = "lm_head"
_NO_HEAD = f"`{_HEAD}` cannot have an adapter; leave it out"


class Spec(BaseModel):
    """Frozen, and strict about unknown fields: a misspelt option is an error, never a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def each(self) -> "list[Self]":
        """One specification for each run of the job: itself, unless it names several models."""
        return [self]


Checkpoint = Literal["last", "best"] | Annotated[int, Field(ge=0, le=2**31 - 1)]


class CheckpointRef(Spec):
    """A checkpoint of a run of this service."""

    run: str = Field(pattern=r"^run_[0-9a-f]{32}$", description="Id of a training run.")
    checkpoint: Checkpoint = Field(
        "last", description="`last`, `best` (highest reward, the earliest of equals), or a step that the run has kept."
    )


class CheckpointsRef(Spec):
    """Several checkpoints of one run of this service."""

    run: str = Field(pattern=r"^run_[0-9a-f]{32}$", description="Id of a training run.")
    checkpoints: tuple[Checkpoint, ...] = Field(
        min_length=1, max_length=32, description="`last`, `best` and steps: an evaluation for each."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.checkpoints)) < len(self.checkpoints):
            raise ValueError("checkpoints: one is named twice; name each once")
        return self


ModelRef = Annotated[
    Name | CheckpointRef,
    Field(description="A registered name (`smollm2-135m`), a hub id, a local folder, or a run's checkpoint."),
]
DatasetRef = Annotated[
    Name,
    Field(
        description="A benchmark (`GET /benchmarks`: `amc23`, `math500?level=5`, ...), "
        "`reasoning-gym:<task>?arg=value&size=N&seed=S`, `data:<file>.jsonl` in the data root, "
        "an uploaded data set (`ds_...`), or a hub id."
    ),
]


class WorkedExample(Spec):
    """One solved problem, put before the question as a user turn and an assistant turn."""

    problem: Text
    solution: Text


class PromptSpec(Spec):
    """How a problem becomes a prompt; part of the identity of a training or an evaluation."""

    template: Literal["chat", "qwen-boxed", "raw"] = Field(
        "chat",
        description="`chat`: the model's own chat template. `qwen-boxed`: Qwen2.5-Math's. `raw`: no chat turns.",
    )
    system_prompt: str | None = Field(None, max_length=20_000, description="System turn; none by default.")
    instruction: str | None = Field(None, max_length=20_000, description="Text added after each problem.")
    worked_examples: tuple[WorkedExample, ...] = Field((), max_length=16)


class LoraSpec(Spec):
    """Low-rank adapters, in PEFT's names."""

    r: int = Field(32, ge=1, le=512, description="Rank.")
    lora_alpha: int = Field(64, ge=1, le=4096, description="Scale; the update is multiplied by alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = Field(
        "all-linear",
        min_length=1,
        description="PEFT's `target_modules`: `all-linear`, a list of names, or one regular expression that matches "
        "full names; not the head, whose weights are scored with.",
    )

    @field_validator("target_modules")
    @classmethod
    def _check_targets(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not isinstance(value, str):
            _check_names(value)
        elif value.lower() != _ALL_LINEAR:
            _check_expression(value)
        return value


def _check_names(names: tuple[str, ...]) -> None:
    for name in names:
        if name.lower() == _ALL_LINEAR:
            raise ValueError(f'`{_ALL_LINEAR}` is no name of a module; write "{_ALL_LINEAR}", not a list')
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"{name!r} is no name of a module; write a list of names, or one expression as a string")
        if name.split(".")[-1] == _HEAD:
            raise ValueError(_NO_HEAD)


def _check_expression(expression: str) -> None:
    if re.fullmatch(r"[\w.,\s-]*", expression):
        raise ValueError("a string is a regular expression that matches full names; write a list of names")
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{error}; write a regular expression, or a list of names") from None
    if _matches(expression, _HEAD):
        raise ValueError(_NO_HEAD)


def _matches(expression: str, name: str) -> bool:
    """Whether it matches all of ``name``, by pydantic's engine, whose time is linear. What that one cannot read, look
    around among it, counts as no match."""
    try:
        TypeAdapter(Annotated[str, StringConstraints(pattern=rf"\A(?:{expression})\z")]).validate_python(name)
    except (ValidationError, SchemaError):
        return False
    return True


class RewardSpec(Spec):
    """One registered reward function and its weight in the sum."""

    name: Name = Field(description="A name that `GET /rewards` lists.")
    weight: float = Field(1.0, ge=-100, le=100)
    args: dict[str, str | int | float | bool] = Field(default_factory=dict, max_length=20)


class HardwareSpec(Spec):
    """What the job runs on; `strategy` is a training's."""

    num_gpus: int = Field(
        0, ge=0, le=64, description="0: what the worker has. Above 1: one process each, on a CPU where there is no GPU."
    )
    strategy: Literal["single", "ddp", "fsdp2", "zero2", "zero3"] = Field(
        "single",
        description="`ddp`: every process holds the whole model. `fsdp2`: each holds a shard of weights, gradients and "
        "optimizer state. `zero2`, `zero3`: DeepSpeed's shards of gradients and optimizer state, at 3 of weights too "
        "(extra `deepspeed`).",
    )


def _check_one_device(hardware: HardwareSpec) -> HardwareSpec:
    if hardware.num_gpus > 1:
        raise ValueError("num_gpus: an analysis runs on one device; write 1")
    return hardware


OneDevice = Annotated[HardwareSpec, AfterValidator(_check_one_device)]
"""What an analysis runs on."""


class JobOptions(Spec):
    """Options of the order, kept on the job row: they are not part of what is computed."""

    name: str | None = Field(None, max_length=200)
    tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = Field((), max_length=32)
    priority: int = Field(0, ge=-9, le=9, description="Higher runs first.")
    depends_on: tuple[str, ...] = Field((), max_length=32, description="Run ids that must succeed first.")
    time_limit_seconds: float | None = Field(None, gt=0)
    max_retries: int = Field(2, ge=0, le=10, description="Re-queues after a lost worker.")


class SamplingSpec(Spec):
    """How responses are sampled."""

    temperature: float = Field(1.0, ge=0, le=10, description="0 is greedy decoding.")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31 - 1, description="0 keeps the whole vocabulary.")
    max_completion_length: int = Field(512, ge=1, le=LONGEST_ANSWER, description="Tokens.")
    seed: int = Field(0, ge=0, le=2**31 - 1)
