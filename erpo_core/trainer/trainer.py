"""ERPOTrainer: TRL's GRPOTrainer with token-level advantages.

Data, rewards, optimisation and saving are TRL's and transformers'. Ours are generation (the prompt computed once),
scoring (float32 logits, no dropout, the prompt once per group), the advantages and the loss (eqs. 4, 5). On-policy, the
advantages are formed from the very forward that is differentiated: ERPO then costs no forward more than GRPO.
"""

import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from erpo_core.advantages import ERPOSignals, erpo_advantages
from erpo_core.generation.transformers import TransformersEngine
from erpo_core.loss import erpo_loss, token_weights
from erpo_core.prompts import stop_token_ids
from erpo_core.trainer.config import ERPOConfig
from erpo_core.trainer.measures import signal_metrics
from erpo_core.trainer.scoring import Rollouts, pad_rollouts, score_rollouts, spread


@dataclass
class MicroBatch:
    """Whole groups of one micro-batch. ``old`` is set where the advantages were formed before the loss."""

    rollouts: Rollouts
    rewards: Tensor
    outcomes: Tensor
    finished: Tensor
    examples: list[dict[str, Any]]
    completions: list[str]
    reward_rows: dict[str, Tensor]
    groups_in_step: int
    tokens_in_step: int
    old: "Scored | None" = None
    last_scored: "Scored | None" = None
    verdicts: list[str] | None = None


@dataclass(frozen=True)
class Scored:
    """Policy and reference on the sampled tokens, (B, T), and the advantages that follow."""

    logps: Tensor
    ref_logps: Tensor
    entropies: Tensor
    leverage_norms: Tensor
    signals: ERPOSignals
    advantages: Tensor


@dataclass
class TraceGroup:
    """What is kept of the groups of one micro-batch, on the CPU."""

    batch: MicroBatch
    scored: Scored
    noise_floor: float
    step: int = field(default=0)


class ERPOTrainer(GRPOTrainer):
    """Used as TRL's GRPOTrainer is: same constructor, same data set format; ``args`` is an :class:`ERPOConfig`.

    Raises:
        ValueError: an argument that ERPO does not support, by name.
    """

    _tag_names = ("trl", "erpo")
    _name = "ERPO"

    def __init__(self, model, reward_funcs=None, args: ERPOConfig | None = None, **kwargs) -> None:
        if args is None:
            args = ERPOConfig("erpo-output")
        if not isinstance(args, ERPOConfig):
            raise ValueError(f"args: an ERPOConfig is needed, not {type(args).__name__}")
        for name in ("tools", "rollout_func", "environment_factory", "eval_dataset"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: not supported by ERPOTrainer; leave it out")
        self.traces: list[TraceGroup] = []
        self.rollout_log: list[MicroBatch] = []
        self._noise = 0.0
        self._entropy_moments: tuple[float, float] | None = None
        loss_type, args.loss_type = args.loss_type, "bnpo"
        super().__init__(model=model, reward_funcs=reward_funcs, args=args, **kwargs)
        args.loss_type = loss_type
        self._check_batches()
        self._reference = self._make_reference()

    # --- rollouts

    def _prepare_inputs(self, generation_batch):
        cycle = self.args.steps_per_generation * self.num_iterations
        if self._step % cycle == 0 or self._buffered_inputs is None:
            self._buffered_inputs = self._roll_out(generation_batch)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        model = self.accelerator.unwrap_model(self.model)
        unique = [list(ids) for ids in prompt_ids[::num_generations]]
        with self._timed("generate"), self._autocast():
            groups = TransformersEngine(model, self.processing_class).generate(
                unique,
                n=num_generations,
                temperature=self.temperature,
                top_p=self.args.top_p,
                top_k=self.args.top_k or 0,
                max_new_tokens=self.max_completion_length,
                stop_ids=stop_token_ids(self.processing_class),
                seed=self._generation_seed(),
            )
        self._finished = [sample.finished for group in groups for sample in group]
        return [sample.token_ids for group in groups for sample in group], None

    def _generation_seed(self) -> int:
        """A seed of its own for each generation: a resumed run samples what the run never stopped would have."""
        rank = self.accelerator.process_index
        return (self.args.seed * 1_000_003 + self.state.global_step * 1_009 + rank) % 2**31

    def _roll_out(self, examples: list[dict[str, Any]]) -> list[MicroBatch]:
        prompts = [example["prompt"] for example in examples]
        prompt_ids, completion_ids, _, completions, *_ = self._generate(prompts)
        with self._timed("rewards"):
            per_function = self._calculate_rewards(examples, prompts, completions, completion_ids)
        per_function = per_function[self._local_rows(len(prompts))]
        verdicts = self._last_verdicts()
        # A response that no function judged is NaN: it is left out of its group.
        weights = self.reward_weights.to(per_function.device)
        rewards = (per_function * weights).nansum(1).masked_fill(per_function.isnan().all(1), torch.nan)
        self._log_rewards(per_function, rewards)
        size = self.args.per_device_train_batch_size
        window = self.args.gradient_accumulation_steps
        pad = self.processing_class.pad_token_id
        device = self.accelerator.device
        batches = []
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            # The optimizer step that this micro-batch belongs to: its sizes are the denominators of the loss.
            first = start // (size * window) * size * window
            in_step = completion_ids[first : first + size * window]
            batches.append(
                MicroBatch(
                    rollouts=pad_rollouts(prompt_ids[part][:: self.num_generations], completion_ids[part], pad, device),
                    rewards=rewards[part],
                    outcomes=per_function[part, self._outcome_index()],
                    finished=torch.tensor(self._finished[part]),
                    examples=examples[part],
                    completions=[_text(completion) for completion in completions[part]],
                    reward_rows={name: per_function[part, i] for i, name in enumerate(self.reward_func_names)},
                    verdicts=verdicts[part] if verdicts else None,
                    groups_in_step=len(in_step) // self.num_generations * self.accelerator.num_processes,
                    tokens_in_step=sum(map(len, in_step)) * self.accelerator.num_processes,
                )
            )
        self.rollout_log += batches
        if self._measures_noise():
            self._measure_noise(batches[0].rollouts)
        if not self._is_on_policy():
            for batch in batches:
                with torch.no_grad():
                    batch.old = self._score(self.model, batch)
        return batches

    def _local_rows(self, count: int) -> slice:
        start = self.accelerator.process_index * count
        return slice(start, start + count)

    def _outcome_index(self) -> int:
        names = self.reward_func_names
        return names.index(self.args.outcome_reward) if self.args.outcome_reward in names else 0

    def _last_verdicts(self) -> list[str] | None:
        for function in self.reward_funcs:
            verdicts = getattr(function, "last_verdicts", None)
            if verdicts:
                return [str(verdict) for verdict in verdicts]
        return None

    def _is_on_policy(self) -> bool:
        """One optimizer step for each generation: the policy that is differentiated is the one that sampled."""
        return self.num_iterations == 1 and self.args.steps_per_generation <= self.args.gradient_accumulation_steps

    # --- scoring and advantages

    def _score(self, model, batch: MicroBatch) -> Scored:
        """Advantages of a micro-batch; ``logps`` carries gradient where the caller has it enabled."""
        policy = self.accelerator.unwrap_model(model)
        rollouts, mask = batch.rollouts, batch.rollouts.mask
        with self._timed("score"):
            with self._deterministic(policy):
                scores = self._scores(policy, rollouts)
            with torch.no_grad():
                ref_logps = spread(self._reference_logps(policy, rollouts), mask)
        logps, entropies = spread(scores.logps, mask), spread(scores.entropies, mask)
        signals = self._advantages(entropies, logps.detach(), ref_logps, mask, batch.rewards)
        advantages = signals.advantages
        if self.args.algorithm == "grpo":
            advantages = signals.group_advantages[:, None] * mask
        if self.args.advantage_clip is not None:
            advantages = advantages.clamp(-self.args.advantage_clip, self.args.advantage_clip)
        return Scored(logps, ref_logps, entropies, spread(scores.leverage_norms, mask), signals, advantages)

    def _scores(self, policy, rollouts: Rollouts):
        shared = not self.args.gradient_checkpointing
        with self._autocast():
            return score_rollouts(policy, rollouts, temperature=self.temperature, share_prompt=shared)

    def _reference_logps(self, policy, rollouts: Rollouts) -> Tensor:
        with self._reference(policy) as reference:
            return self._scores(reference, rollouts).logps

    def _advantages(self, entropies, logps, ref_logps, mask, rewards) -> ERPOSignals:
        args = self.args
        mean, std = self._entropy_statistics()
        signals = erpo_advantages(
            entropies,
            logps,
            ref_logps,
            mask,
            rewards,
            num_generations=self.num_generations,
            num_buckets=args.num_buckets,
            gate_scale=args.gate_scale,
            progress_scale=args.progress_scale,
            synthesis_weight=args.synthesis_weight,
            psi_std=args.psi_std,
            stabilizer=args.stabilizer,
            progress_noise_floor=self.noise_floor,
            entropy_mean=mean,
            entropy_std=std,
            gate=args.gate,
            anchor=args.anchor,
            norm=args.norm,
        )
        if args.entropy_stats == "ema":
            self._update_entropy_statistics(entropies[mask])
        return signals

    def _entropy_statistics(self) -> tuple[float | None, float | None]:
        if self._entropy_moments is None:
            return None, None
        mean, second = self._entropy_moments
        return mean, max(second - mean**2, 0.0) ** 0.5

    def _update_entropy_statistics(self, entropies: Tensor) -> None:
        if not len(entropies):
            return
        fresh = entropies.mean().item(), entropies.square().mean().item()
        decay = self.args.entropy_ema_decay
        held = self._entropy_moments or fresh
        self._entropy_moments = tuple(decay * old + (1 - decay) * new for old, new in zip(held, fresh, strict=True))

    # --- noise of the progress signal

    @property
    def noise_floor(self) -> float:
        """Buckets whose progress spreads no more than this are silent."""
        wanted = self.args.progress_noise_floor
        return max(2 * self._noise, 1e-6) if wanted == "auto" else float(wanted)

    def _measures_noise(self) -> bool:
        wanted = self.args.algorithm == "erpo" and self.args.progress_noise_floor == "auto"
        return wanted and self.state.global_step % self.args.noise_floor_every == 0

    @torch.no_grad()
    def _measure_noise(self, rollouts: Rollouts) -> None:
        """The same tokens at another batch size, half a group at a time: what differs is rounding."""
        size = self.num_generations
        step = max(1, size // 2)
        policy = self.accelerator.unwrap_model(self.model)
        with self._timed("noise"), self._deterministic(policy):
            whole = self._scores(policy, rollouts).logps
            parts = [
                self._scores(policy, rollouts.part(start, min(start + step, first + size))).logps
                for first in range(0, len(rollouts.mask), size)
                for start in range(first, first + size, step)
            ]
        self._noise = self.args.progress_scale * (whole - torch.cat(parts)).std(correction=0).item()

    # --- loss

    def _compute_loss(self, model, inputs: MicroBatch) -> Tensor:
        batch = inputs
        if batch.old is None:
            scored = self._score(model, batch)
            logps, old_logps = scored.logps, scored.logps.detach()
        else:
            scored = batch.old
            policy = self.accelerator.unwrap_model(model)
            with self._deterministic(policy):
                logps = spread(self._scores(policy, batch.rollouts).logps, batch.rollouts.mask)
            old_logps = scored.logps
        args, mask = self.args, batch.rollouts.mask
        weights = token_weights(
            mask,
            loss_type=args.loss_type,
            num_generations=self.num_generations,
            groups_in_step=batch.groups_in_step,
            tokens_in_step=batch.tokens_in_step,
        )
        terms = erpo_loss(
            logps,
            old_logps,
            scored.ref_logps if self.beta else None,
            scored.advantages,
            weights,
            epsilon=args.epsilon,
            epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
            beta=self.beta,
        )
        batch.last_scored = scored
        self._record(batch, scored, terms)
        # DDP averages the ranks' gradients, the weights are those of the whole step.
        return terms.loss * self.accelerator.num_processes

    # --- records

    def _record(self, batch: MicroBatch, scored: Scored, terms) -> None:
        mask = batch.rollouts.mask
        for name, value in signal_metrics(batch, scored, terms, self.num_generations, self.noise_floor).items():
            self._metrics["train"][name].append(value)
        self._metrics["train"]["erpo/progress_noise"].append(self._noise)
        self._metrics["train"]["num_active_tokens"] = [mask.sum().item()]
        step = self.state.global_step + 1
        last = step == self.state.max_steps
        if self.args.trace_every and (step == 1 or last or step % self.args.trace_every == 0):
            self.traces.append(TraceGroup(batch, scored, self.noise_floor, step))

    def _log_rewards(self, per_function: Tensor, rewards: Tensor) -> None:
        metrics = self._metrics["train"]
        for index, name in enumerate(self.reward_func_names):
            metrics[f"rewards/{name}"].append(per_function[:, index].nanmean().item())
        metrics["reward"].append(rewards.nanmean().item())
        grouped = rewards.view(-1, self.num_generations)
        metrics["reward_std"].append(grouped.std(1).nanmean().item())

    @contextmanager
    def _timed(self, phase: str):
        start = time.perf_counter()
        yield
        self._metrics["train"][f"time/{phase}"].append(time.perf_counter() - start)

    # --- the model

    def _autocast(self):
        return self.accelerator.autocast() if self.args.bf16 or self.args.fp16 else nullcontext()

    @contextmanager
    def _deterministic(self, model):
        """Dropout is noise in s: scoring and loss run without it. Layers with no other train mode are not touched."""
        training = model.training
        if not self.args.gradient_checkpointing:
            model.eval()
        yield
        model.train(training)

    def _make_reference(self):
        """A context manager that turns the policy into the frozen policy that training started from."""
        from peft import PeftModel

        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PeftModel):
            frozen = self.ref_model or _frozen_copy(model)
            return lambda policy: nullcontext(frozen)
        if "ref" in model.peft_config:
            return _use_adapter
        return _without_adapter

    def _check_batches(self) -> None:
        window = self.args.gradient_accumulation_steps
        if self.args.steps_per_generation % window and window % self.args.steps_per_generation:
            raise ValueError(
                f"steps_per_generation: {self.args.steps_per_generation} and gradient_accumulation_steps ({window}) "
                "must divide one another, so that a generation ends with an optimizer step"
            )


def _frozen_copy(model):
    import copy

    return copy.deepcopy(model).eval().requires_grad_(False)


@contextmanager
def _without_adapter(policy):
    training = policy.training
    policy.eval()
    with policy.disable_adapter():
        yield policy
    policy.train(training)


@contextmanager
def _use_adapter(policy):
    training = policy.training
    policy.eval()
    policy.set_adapter("ref")
    yield policy
    policy.set_adapter("default")
    policy.train(training)


def _text(completion: str | list[dict[str, str]]) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]
