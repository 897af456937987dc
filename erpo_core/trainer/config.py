"""ERPOConfig: TRL's GRPOConfig with ERPO's parameters and the paper's defaults (erpo-spec section 8)."""

from dataclasses import dataclass, field

import torch
from trl import GRPOConfig

from erpo_core.trainer.zero import take_configuration

ALGORITHMS = ("erpo", "grpo")
SCORING_DTYPES = ("auto", "float32", "bfloat16")
TOKEN_CORRECTIONS = ("token_truncate", "token_mask")
LOSS_TYPES = ("erpo", "dapo", "bnpo", "grpo")
VLLM_MODES = ("colocate", "server")


@dataclass
class ERPOConfig(GRPOConfig):
    """Everything that TRL sets otherwise is set here by name; what would silently undo ERPO is refused.

    Raises:
        ValueError: an option that ERPO does not implement, named with what to write instead.
    """

    algorithm: str = field(default="erpo", metadata={"help": "`erpo`, or `grpo`: A_i for every token, all else equal."})
    num_buckets: int = field(default=10, metadata={"help": "K of eq. 9."})
    gate_scale: float = field(default=1.0, metadata={"help": "gamma of eq. 8."})
    progress_scale: float = field(default=1.0, metadata={"help": "beta_progress of eq. 7."})
    synthesis_weight: float = field(default=0.5, metadata={"help": "eta of eq. 10."})
    psi_std: float = field(default=1.0, metadata={"help": "sigma_target of eq. 10."})
    stabilizer: float = field(default=1e-6, metadata={"help": "delta."})
    progress_noise_floor: float | str = field(default="auto", metadata={"help": "A number, or `auto`: measured."})
    noise_floor_every: int = field(default=50, metadata={"help": "Steps between measurements of the noise."})
    entropy_stats: str = field(default="group", metadata={"help": "`group`, or `ema`."})
    entropy_ema_decay: float = field(default=0.99, metadata={"help": "Decay of `ema`."})
    gate: bool = field(default=True, metadata={"help": "Ablation: off is W = 1."})
    anchor: bool = field(default=True, metadata={"help": "Ablation: off is sgn(A) = 1."})
    norm: bool = field(default=True, metadata={"help": "Ablation: off leaves out the last normalisation."})
    advantage_clip: float | None = field(default=None, metadata={"help": "Bound on |A^|."})
    scoring_dtype: str = field(
        default="auto", metadata={"help": "`float32`, `bfloat16`, or `auto`: float32 on the CPU and up to 0.5B."}
    )
    max_skipped_steps: int = field(default=10, metadata={"help": "Steps with a non-finite gradient before it fails."})
    outcome_reward: str = field(default="accuracy", metadata={"help": "The reward that decides right and wrong."})
    trace_every: int = field(default=0, metadata={"help": "Steps between kept token traces; 0 keeps none."})
    trace_groups: int = field(default=1, metadata={"help": "Groups kept each time."})
    dynamic_sampling: bool = field(
        default=False, metadata={"help": "Prompts whose answers all have one reward give way to others, as in DAPO."}
    )
    max_resample_rounds: int = field(default=3, metadata={"help": "Rounds of `dynamic_sampling` at most."})

    num_generations: int = 8
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 2
    learning_rate: float = 5e-6
    warmup_steps: float = 0.1
    lr_scheduler_type: str = "cosine"
    weight_decay: float = 0.001
    num_train_epochs: float = 1.0
    max_completion_length: int | None = 1024
    beta: float = 0.04
    epsilon: float = 0.2
    loss_type: str = "erpo"
    scale_rewards: str = "group"
    use_bias_correction_kl: bool = False
    vllm_importance_sampling_correction: bool = False
    vllm_importance_sampling_mode: str = "token_truncate"
    disable_dropout: bool = True
    gradient_checkpointing: bool = False
    bf16: bool | None = None
    logging_steps: float = 1
    logging_nan_inf_filter: bool = False
    report_to: str | list[str] = "none"

    def __post_init__(self):
        self._refuse()
        wanted, self.loss_type = self.loss_type, "bnpo"
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available() and not self.use_cpu and not self.fp16
        super().__post_init__()
        # Before a model is loaded: transformers would load it in DeepSpeed's shards, TRL train adapters in bfloat16.
        take_configuration(self)
        self.loss_type = wanted

    def _refuse(self) -> None:
        for name, wanted, why in (
            ("importance_sampling_level", "token", "a sequence ratio spreads token credit evenly again"),
            ("scale_rewards", "group", "ERPO's group advantage is eq. 3"),
            ("use_liger_kernel", False, "the head is scored by erpo_core.logits"),
            ("sync_ref_model", False, "the reference is the policy that training started from"),
            ("vllm_tensor_parallel_size", 1, "vLLM shares the trainer's device"),
            ("vllm_enable_sleep_mode", False, "vLLM keeps its share of the memory"),
            ("multi_objective_aggregation", "sum_then_normalize", "it changes eq. 3"),
            ("mask_truncated_completions", False, "truncated responses count as the rewards say"),
            ("off_policy_mask_threshold", None, "it tests the sign of a sequence's advantage"),
            ("delta", None, "two-sided clipping is not part of eq. 5"),
            ("use_bias_correction_kl", False, "eq. 4 has the plain k3 estimator"),
            ("disable_dropout", True, "dropout is noise in the progress signal"),
            ("entropy_coef", 0.0, "there is no entropy bonus in eq. 5"),
            ("use_adaptive_entropy", False, "there is no entropy bonus in eq. 5"),
            ("min_p", None, "the sampler has temperature, top_p and top_k"),
            ("repetition_penalty", 1.0, "the scored distribution would not be the sampled one"),
            ("generation_kwargs", None, "the sampler has temperature, top_p and top_k"),
            ("use_transformers_continuous_batching", False, "sampling is erpo_core.generation's"),
            ("use_transformers_paged", False, "sampling is erpo_core.generation's"),
            ("cast_lm_head_to_fp32", False, "logits are float32 anyway"),
            ("fp16", False, "use bf16"),
            ("eval_strategy", "no", "evaluate with erpo_core.evaluation"),
        ):
            value = getattr(self, name, wanted)
            if value != wanted and not (name == "scale_rewards" and value is True):
                raise ValueError(f"{name}: {value!r} is not supported by ERPO ({why}); leave it at {wanted!r}")
        if self.scoring_dtype not in SCORING_DTYPES:
            raise ValueError(f"scoring_dtype: {self.scoring_dtype!r} is none of {', '.join(SCORING_DTYPES)}")
        if not 0 < self.top_entropy_quantile <= 1:
            raise ValueError(f"top_entropy_quantile: {self.top_entropy_quantile!r} is not above 0 and at most 1")
        self._check_correction()
        if self.max_resample_rounds < 1:
            raise ValueError(f"max_resample_rounds: {self.max_resample_rounds!r} is below 1")
        if self.entropy_stats not in ("group", "ema"):
            raise ValueError(f"entropy_stats: {self.entropy_stats!r} is none of group, ema")
        if self.vllm_mode not in VLLM_MODES:
            raise ValueError(f"vllm_mode: {self.vllm_mode!r} is none of {', '.join(VLLM_MODES)}")
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm: {self.algorithm!r} is none of {', '.join(ALGORITHMS)}")
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type: {self.loss_type!r} is none of {', '.join(LOSS_TYPES)}")

    def _check_correction(self) -> None:
        mode = self.vllm_importance_sampling_mode
        if mode not in TOKEN_CORRECTIONS:
            raise ValueError(
                f"vllm_importance_sampling_mode: {mode!r} is none of {', '.join(TOKEN_CORRECTIONS)}; "
                "a sequence's ratio spreads token credit evenly again"
            )
        if not self.vllm_importance_sampling_correction:
            return
        if not self.use_vllm:
            raise ValueError("vllm_importance_sampling_correction: only with use_vllm; leave it at False")
        if self.top_p < 1 or self.top_k:
            raise ValueError(
                "vllm_importance_sampling_correction: the engine gives log-probabilities only of the whole "
                "distribution; write top_p=1 and top_k=0"
            )
        if self.vllm_mode == "server" and self.temperature != 1:
            raise ValueError(
                "vllm_importance_sampling_correction: a vLLM server gives log-probabilities at temperature 1 alone; "
                "write temperature=1"
            )
