"""ERPOTrainer: TRL's GRPOTrainer with token-level advantages.

Data, rewards, optimisation and saving are TRL's and transformers'. Ours are generation (the prompt computed once),
scoring (float32 logits, no dropout, one packed row), the advantages and the loss (eqs. 4, 5). On-policy, the advantages
are formed from the very forward that is differentiated: ERPO then costs no forward more than GRPO.
"""

import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import fields
from inspect import Signature, signature
from typing import Any, ClassVar

import torch
from accelerate import DistributedType
from datasets import IterableDataset
from torch import Tensor
from trl import GRPOTrainer

from erpo_core.heads import body_of, check_head, check_training_mode
from erpo_core.loss import LossTerms, erpo_loss, importance_ratios
from erpo_core.metric_names import told_apart
from erpo_core.models import widen_adapters, without_dropout
from erpo_core.packing import ATTENTION, attention, supports_packing
from erpo_core.trainer import measures, ranks
from erpo_core.trainer.batches import MicroBatch, Scored, TraceGroup
from erpo_core.trainer.config import ERPOConfig
from erpo_core.trainer.credit import TokenCredit
from erpo_core.trainer.guards import SaveAtBoundaries, SkipNonFinite
from erpo_core.trainer.reference import Reference, check_adapters
from erpo_core.trainer.rollouts import SampledAnswers
from erpo_core.trainer.rows import stack_rows
from erpo_core.trainer.sampling import make_sampler
from erpo_core.trainer.saving import RotateCheckpoints, WholeCheckpoints
from erpo_core.trainer.scoring import depends_on_adapter
from erpo_core.trainer.sharding import ShardedWeights
from erpo_core.trainer.state import RunState
from erpo_core.trainer.totals import Totals
from erpo_core.trainer.traces import traced_answers
from erpo_core.trainer.zero import ZeroParts

_LAYOUTS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
_AFTER_ARGS = Signature(list(signature(GRPOTrainer.__init__).parameters.values())[4:])
"""TRL's arguments after ``args``, which may be given by position."""
_NO_EVALUATION = (
    "not supported by ERPOTrainer; sample from the policy with trainer.sample, or name `eval_benchmarks` in a job"
)


class ERPOTrainer(ShardedWeights, ZeroParts, WholeCheckpoints, SampledAnswers, TokenCredit, GRPOTrainer):
    """Used as TRL's GRPOTrainer is: same constructor, same data set format; ``args`` is an :class:`ERPOConfig`.

    Raises:
        ValueError: an argument that ERPO does not support, by name.
    """

    _tag_names = ("trl", "erpo")
    _name = "ERPO"
    _paper: ClassVar = {
        "title": "ERPO: Token-Level Entropy-Regulated Policy Optimization for Large Reasoning Models",
        "id": "2603.28204",
    }

    def __init__(self, model, reward_funcs=None, args: ERPOConfig | None = None, *rest, **kwargs) -> None:
        kwargs = _AFTER_ARGS.bind(*rest, **kwargs).arguments
        if args is None:
            args = ERPOConfig("erpo-output")
        if not isinstance(args, ERPOConfig):
            raise ValueError(f"args: an ERPOConfig is needed, not {type(args).__name__}")
        _check_arguments(args, kwargs)
        check_adapters(model, kwargs.get("peft_config"))
        if args.algorithm == "grpo":
            self._tag_names, self._name, self._paper = GRPOTrainer._tag_names, GRPOTrainer._name, GRPOTrainer._paper
        self.keeps_rollouts = self.keeps_traces = False
        self.run_state = RunState()
        self._forget_steps()
        # TRL would load a reference by the model's name, or none at all where beta is 0; ERPO always needs its own.
        # Its vLLM merges the adapter into the base, which is our reference.
        kept = {"loss_type": args.loss_type, "beta": args.beta, "use_vllm": args.use_vllm}
        args.loss_type, args.beta, args.use_vllm = "bnpo", 0.0, False
        try:
            super().__init__(model=model, reward_funcs=reward_funcs, args=args, **kwargs)
        finally:
            args.loss_type, args.beta, args.use_vllm = kept["loss_type"], kept["beta"], kept["use_vllm"]
        if self._is_vlm:
            raise ValueError(
                "processing_class: a processor is not supported, ERPOTrainer trains models of text; give its tokenizer"
            )
        widen_adapters(self._policy)
        without_dropout(self._policy)
        check_head(self._policy)
        if args.gradient_checkpointing:
            check_training_mode(self._policy)
        self.beta = args.beta
        self.reward_func_names = told_apart(self.reward_func_names)
        self._check_layout()
        self._check_outcome()
        self._reference = Reference(self._policy)
        self._engine_of = make_sampler(args, self._policy, self.processing_class, self.accelerator)
        self._scores_in_float32 = self._resolve_scoring_dtype() == "float32"
        self._guard = SkipNonFinite(self)
        self.add_callback(self._guard)
        self._last_callbacks = (SaveAtBoundaries(), RotateCheckpoints(self))
        for callback in self._last_callbacks:
            self.add_callback(callback)

    def train(self, *args, **kwargs):
        """As transformers' Trainer. An interrupted training of this trainer has left nothing of its step: answers that
        were not used up are another policy's."""
        self._forget_steps()
        self._pending_metrics.clear()
        self._pending_extra_logs.clear()
        for callback in self._last_callbacks:  # behind those that were added meanwhile
            self.remove_callback(callback)
            self.add_callback(callback)
        return super().train(*args, **kwargs)

    def _forget_steps(self) -> None:
        self.traces: list[TraceGroup] = []
        self.rollout_log: list[MicroBatch] = []
        self._step, self._buffered_inputs, self._resample_round = 0, None, 0
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._totals = Totals()
        self._applied: list[tuple[Tensor, Tensor, Tensor]] = []
        self._entropy_sums = [0.0, 0.0, 0.0]
        self._noise_step = self._scored_step = -1

    @property
    def _policy(self):
        """The model below DDP's wrapper."""
        return self.accelerator.unwrap_model(self.model)

    def evaluate(self, *args, **kwargs):
        """Not supported: TRL's loop would take the answers that are trained on for those of a data set.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"evaluate: {_NO_EVALUATION}")

    def predict(self, *args, **kwargs):
        """Not supported, as :meth:`evaluate`.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"predict: {_NO_EVALUATION}")

    # --- loss

    def _compute_loss(self, model, inputs: MicroBatch) -> Tensor:
        batch, policy = inputs, self.accelerator.unwrap_model(model)
        mask = batch.rollouts.mask
        if batch.old is None:
            logps, scored = self._score_in_the_loss(policy, batch)
        else:
            logps, scored = self._score_again(policy, batch)
        advantages = self._corrected(scored, batch)
        terms = erpo_loss(
            logps,
            scored.logps,
            scored.ref_logps if self._needs_reference else None,
            advantages,
            batch.weights[:, None] * mask,
            epsilon=self.args.epsilon,
            epsilon_high=self.args.epsilon if self.args.epsilon_high is None else self.args.epsilon_high,
            beta=self.beta,
        )
        batch.last_scored = scored
        self._record(batch, scored, terms, advantages)
        if self.args.gradient_checkpointing and supports_packing(body_of(policy)):
            self._until_backward.enter_context(attention(policy.config, ATTENTION))
        # Nothing to differentiate where every group is dead.
        return terms.loss if terms.loss.requires_grad else terms.loss.requires_grad_()

    def _corrected(self, scored: Scored, batch: MicroBatch) -> Tensor:
        """(B, T) advantages, times how much more likely the trainer has each token than the engine that sampled it."""
        args = self.args
        if not args.vllm_importance_sampling_correction:
            return scored.advantages
        ratios, clipped = importance_ratios(
            scored.logps,
            batch.engine_logps,
            mode=args.vllm_importance_sampling_mode,
            clip_min=args.vllm_importance_sampling_clip_min,
            clip_max=args.vllm_importance_sampling_clip_max,
        )
        measures.count_ratios(self._totals, ratios[batch.rollouts.mask], clipped[batch.rollouts.mask])
        return scored.advantages * ratios

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch. At the end of an optimizer step the ranks' gradients and statistics come together."""
        before, start = sum(self._seconds.values()), self._clock()
        with ExitStack() as self._until_backward:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            ranks.sum_gradients(self.accelerator, self._policy)
            self._guard.look()
            self._totals.merge(self._of_step.state())
            if self._applied:
                self._count_applied()
            if self._traces_this_step():
                self._keep_traces()
            count, total, squares = ranks.total_of(self.accelerator, self._entropy_sums)
            if count and total - total == 0:
                self.run_state.update_entropy(total / count, squares / count, self.args.entropy_ema_decay)
            self._entropy_sums = [0.0, 0.0, 0.0]
        other = sum(self._seconds.values()) - before
        self._seconds["backward"] += self._clock() - start - other
        # The logs show the ranks' mean of what is this rank's share of a sum.
        return loss * self.accelerator.num_processes

    # --- records

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with what the steps since the last call have counted on all ranks."""
        self._guard.keep_sums_finite(logs)
        if self._totals:
            with self._timed("log"):
                found = measures.step_metrics(ranks.gather_totals(self.accelerator, self._totals), self.noise)
            if not self._needs_reference:
                found = {name: v for name, v in found.items() if name not in measures.OF_REFERENCE}
            found["erpo/skipped_steps"] = self.run_state.skipped_steps
            found |= {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
            found = self._told_by_rewards() | found
            for name, value in found.items():
                self._metrics["train"][name] = [value]
            self._totals = Totals()
            self._seconds.clear()
        super().log(logs, start_time)

    def _told_by_rewards(self) -> dict[str, float]:
        """What reward functions have given to ``log_metric`` since the last call, each the mean over all ranks' values.

        What they gave to ``log_extra`` goes where TRL keeps it. All ranks must call it.
        """
        values: defaultdict[str, list[float]] = defaultdict(list)
        own = dict(self._pending_metrics), dict(self._pending_extra_logs)
        for metrics, columns in ranks.gather_list(self.accelerator, [own]):
            for name, given in metrics.items():
                values[name] += map(float, given)
            for name, given in columns.items():
                self._logs["extra"][name].extend(given)
        self._pending_metrics.clear()
        self._pending_extra_logs.clear()
        return {name: sum(given) / len(given) for name, given in values.items()}

    def _record(self, batch: MicroBatch, scored: Scored, terms: LossTerms, advantages: Tensor) -> None:
        measures.count_batch(self._totals, batch, scored, terms)
        measures.count_engine(self._totals, batch, scored)
        if self.args.algorithm == "erpo":
            applied = advantages.masked_fill(terms.clipped_low | terms.clipped_high, 0.0)
            self._applied.append((applied, scored.signals.advantages, batch.rollouts.mask))

    def _count_applied(self) -> None:
        """Eq. 16 on what the optimizer got in this step, unless a group's answers lie in several steps.

        All ranks must call it.
        """
        size, totals = self.num_generations, self._totals
        applied, advantages, mask = (stack_rows(list(rows)) for rows in zip(*self._applied, strict=True))
        self._applied = []
        if len(mask) % size:
            if self.args.steps_per_generation > self.args.gradient_accumulation_steps:
                return
            applied, advantages, mask = (
                ranks.gather_rows(self.accelerator, rows) for rows in (applied, advantages, mask)
            )
            totals = self._totals if self.accelerator.is_main_process else Totals()
        measures.count_invariants(totals, "_applied", applied, measures.live_groups(advantages, size), mask, size)

    def _keep_traces(self) -> None:
        """The first groups of the generation at hand, from all its micro-batches and ranks. All ranks must call it."""
        size, batches = self.num_generations, self._buffered_inputs
        own = sum(len(batch.rewards) for batch in batches)
        wanted = min(self.args.trace_groups * size, own * self.accelerator.num_processes)
        first = self.accelerator.process_index * own
        answers = [
            answer
            for batch in batches
            for answer in traced_answers(batch, batch.old or batch.last_scored, wanted - first - batch.first_row)
        ]
        if wanted > own:
            answers = ranks.gather_list(self.accelerator, answers)
        if self.keeps_rollouts:
            gate_stats = (batches[0].old or batches[0].last_scored).gate_stats
            self.traces += [
                TraceGroup(number, group, self.noise_floor, gate_stats, self.state.global_step + 1)
                for number, group in enumerate(self._groups_of(answers))
            ]

    def _traces_this_step(self) -> bool:
        step, every = self.state.global_step + 1, self.args.trace_every
        return self.keeps_traces and bool(every) and (step in (1, self.state.max_steps) or step % every == 0)

    # --- the model

    @contextmanager
    def _timed(self, phase: str):
        start = self._clock()
        yield
        self._seconds[phase] += self._clock() - start

    def _clock(self) -> float:
        """Seconds. A GPU is waited for: otherwise a phase's time is that of asking, and its work the next one's."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _autocast(self, wanted: bool):
        return self.accelerator.autocast() if wanted else nullcontext()

    def _check_outcome(self) -> None:
        default = next(field.default for field in fields(self.args) if field.name == "outcome_reward")
        wanted, known = self.args.outcome_reward, self.reward_func_names
        if wanted != default and wanted not in known:
            raise ValueError(f"outcome_reward: {wanted!r} is no reward function; write one of {', '.join(known)}")

    def _check_layout(self) -> None:
        window = self.args.gradient_accumulation_steps
        if self.args.steps_per_generation % window:
            raise ValueError(
                f"steps_per_generation: {self.args.steps_per_generation} must be a multiple of "
                f"gradient_accumulation_steps ({window}), so that a generation holds whole optimizer steps"
            )
        kind = self.accelerator.distributed_type
        if kind not in _LAYOUTS:
            raise ValueError(f"distributed_type: {kind.value} is not supported; use DDP, FSDP2, or DeepSpeed's ZeRO")
        if kind == DistributedType.FSDP:
            _check_sharded(self._policy)


def _check_arguments(args: ERPOConfig, given: dict[str, Any]) -> None:
    for name in ("tools", "rollout_func", "environment_factory", "eval_dataset"):
        if given.get(name) is not None:
            raise ValueError(f"{name}: not supported by ERPOTrainer; leave it out")
    dataset = given.get("train_dataset")
    for name in ("image", "images"):
        if name in (getattr(dataset, "column_names", None) or ()):
            raise ValueError(f"train_dataset: column {name!r}: ERPOTrainer trains models of text; remove it")
    if args.dynamic_sampling and isinstance(dataset, IterableDataset):
        raise ValueError("dynamic_sampling: prompts of a stream cannot be drawn; give a Dataset, or write False")
    if getattr(given.get("peft_config"), "lora_dropout", 0):
        raise ValueError("peft_config: lora_dropout does nothing, scoring is without dropout; write 0")


def _check_sharded(policy: Any) -> None:
    for config in getattr(policy, "peft_config", {}).values():
        if config.trainable_token_indices:
            raise ValueError("peft_config: trainable_token_indices is not supported with FSDP2; use DDP or ZeRO")
    if policy.config.get_text_config().tie_word_embeddings and depends_on_adapter(policy.get_input_embeddings()):
        raise ValueError("peft_config: modules_to_save of tied embeddings is not supported with FSDP2; use DDP or ZeRO")
