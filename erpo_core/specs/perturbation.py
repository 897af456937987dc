"""The body of `POST /analyze/perturbation`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from erpo_core.specs.common import (
    DatasetRef,
    HardwareSpec,
    JobOptions,
    ModelRef,
    OneDevice,
    PromptSpec,
    SamplingSpec,
    Spec,
)

Arm = Literal["high", "low", "random", "random_matched", "same"]
Policy = Literal["uniform_vocab", "on_policy_alt", "second_best", "surprisal_matched", "truncate"]
OUTCOMES_STEP, ATTEMPTS_STEP = 0, 1
"""The steps under which answers are stored: continuations of disturbed ones; those that showed what is solved."""
_ARMS: tuple[Arm, ...] = ("high", "low", "random", "random_matched", "same")


class PerturbationSpec(Spec):
    """Does it matter where a right answer is disturbed? Tokens of high and of low entropy against controls.

    Problems that the model solves are found by sampling. One right answer of each is disturbed in every arm, continued
    by the model and checked; accuracies are compared over the same problems.
    """

    model: ModelRef
    dataset: DatasetRef
    prompt: PromptSpec = PromptSpec()
    sampling: SamplingSpec = Field(
        SamplingSpec(), description="Of the first answers and of the continuations; the length bounds each of them."
    )
    limit: int | None = Field(
        None, ge=1, le=2**31 - 1, description="Problems that are tried at most, by order of the file."
    )
    num_problems: int = Field(200, ge=1, le=10_000, description="Solved problems that are wanted.")
    num_attempts: int = Field(4, ge=1, le=64, description="Answers sampled to find whether a problem is solved.")
    min_solved: float = Field(1.0, gt=0, le=1, description="Share of the attempts that must be right.")

    arms: tuple[Arm, ...] = Field(
        _ARMS,
        min_length=2,
        description="`high`, `low`: highest and lowest entropy. `random`: any token. `random_matched`: for each "
        "token of `high` another one from the same tenth of the answer. `same`: those of `high`, nothing replaced.",
    )
    mode: Literal["branch_one", "edit_all"] = Field(
        "branch_one",
        description="`branch_one`: one token replaced, the rest written anew. `edit_all`: every token of the arm "
        "replaced in place, the answer written anew.",
    )
    policy: Policy = Field(
        "on_policy_alt",
        description="What replaces a token. `uniform_vocab`: any token. `on_policy_alt`: drawn from the model without "
        "the token. `second_best`: the likeliest other. `surprisal_matched`: any whose surprisal lies in "
        "`surprisal_band`. `truncate`: none, the answer is cut before it.",
    )
    fraction: float = Field(0.05, gt=0, le=0.5, description="Share of an answer's tokens that is high, and low.")
    num_positions: int = Field(1, ge=1, le=32, description="`branch_one`: tokens disturbed per arm and problem.")
    num_continuations: int = Field(4, ge=1, le=64, description="Continuations of each disturbed answer.")
    surprisal_band: tuple[float, float] = Field((4.0, 8.0), description="Nats, of `surprisal_matched`.")
    temperature: float = Field(1.0, gt=0, le=10, description="Entropy is that of softmax(logits / temperature).")
    batch_size: int = Field(64, ge=1, le=4096, description="Sequences decoded together.")
    bf16: bool | None = Field(None, description="null: float32 on the CPU, bfloat16 on CUDA.")
    hardware: OneDevice = HardwareSpec()
    job: JobOptions = JobOptions()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.arms)) < len(self.arms):
            raise ValueError("arms: an arm is named twice; name each once")
        if self.mode == "edit_all" and self.policy == "truncate":
            raise ValueError("policy: `truncate` cuts at one token; use mode `branch_one` or another policy")
        for name in ("num_attempts", "num_continuations"):
            if self.sampling.temperature == 0 and getattr(self, name) > 1:
                raise ValueError(f"{name}: greedy decoding repeats itself; write 1 or raise sampling.temperature")
        low, high = self.surprisal_band
        if not 0 <= low < high:
            raise ValueError("surprisal_band: not a range; write [low, high] with 0 <= low < high")
        return self
