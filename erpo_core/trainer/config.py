"""ERPOConfig: TRL's GRPOConfig with ERPO's parameters and the paper's defaults (erpo-spec section 8)."""

from dataclasses import MISSING, Field, dataclass, field, fields

import torch
from trl import GRPOConfig

from erpo_core.trainer.options import REFUSED, SAME_AS_DEFAULT
from erpo_core.trainer.zero import take_configuration

TOKEN_CORRECTIONS = ("token_truncate", "token_mask")
CHOICES = {
    "algorithm": ("erpo", "grpo"),
    "dead_group_on": ("total", "outcome"),
    "entropy_stats": ("group", "ema"),
    "loss_type": ("erpo", "dapo", "bnpo", "grpo"),
    "scoring_dtype": ("auto", "float32", "bfloat16"),
    "vllm_mode": ("colocate", "server"),
}
LEAST = {
    "gate_scale": 0,
    "max_completion_length": 1,
    "max_resample_rounds": 1,
    "max_skipped_steps": 0,
    "noise_floor_every": 1,
    "num_buckets": 1,
    "psi_std": 0,
    "synthesis_weight": 0,
    "trace_every": 0,
    "trace_groups": 1,
}
ABOVE_ZERO = ("advantage_clip", "progress_scale", "stabilizer")
"""None, where that is the default, is off."""


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
    # Parsers of transformers and TRL know no `float | str`.
    progress_noise_floor: str = field(default="auto", metadata={"help": "A number, or `auto`: measured."})
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
    dead_group_on: str = field(
        default="total", metadata={"help": "A group is dead where these are equal: `total` rewards, or `outcome`."}
    )
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
        if self.scoring_dtype == "bfloat16" and not self.bf16:
            raise ValueError("scoring_dtype: 'bfloat16' is only with bf16; write bf16=True, or 'float32'")
        super().__post_init__()
        # Before a model is loaded: transformers would load it in DeepSpeed's shards, TRL train adapters in bfloat16.
        take_configuration(self)
        self.loss_type = wanted

    def _refuse(self) -> None:
        for option in fields(self):
            if option.name in REFUSED:
                self._refuse_change(option)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r} is none of {', '.join(known)}")
        self._check_ranges()
        self._check_correction()

    def _check_ranges(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is None or not value >= least:
                raise ValueError(f"{name}: {value!r} is not a number of at least {least}")
        for name in ABOVE_ZERO:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: {value!r} is not above 0")
        if not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature!r} is not above 0; greedy answers of a group are all one")
        for name in ("top_entropy_quantile", "top_p"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not above 0 and at most 1")
        if not 0 <= self.entropy_ema_decay < 1:
            raise ValueError(f"entropy_ema_decay: {self.entropy_ema_decay!r} is not from 0 to below 1")
        if self.progress_noise_floor != "auto":
            try:
                self.progress_noise_floor = float(self.progress_noise_floor)
            except ValueError:
                raise ValueError(
                    f"progress_noise_floor: {self.progress_noise_floor!r} is neither a number nor 'auto'"
                ) from None

    def _refuse_change(self, option: Field) -> None:
        wanted = option.default if option.default is not MISSING else option.default_factory()
        value = getattr(self, option.name)
        if value != wanted and value != SAME_AS_DEFAULT.get(option.name, wanted):
            why = REFUSED[option.name]
            raise ValueError(f"{option.name}: {value!r} is not supported by ERPO ({why}); leave it at {wanted!r}")

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
