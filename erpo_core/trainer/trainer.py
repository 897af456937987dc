"""ERPOTrainer: TRL's GRPOTrainer with token-level advantages.

Data, rewards, optimisation and saving are TRL's and transformers'. Ours are generation (the prompt computed once),
scoring (float32 logits, no dropout, the prompt once per group), the advantages and the loss (eqs. 4, 5). On-policy, the
advantages are formed from the very forward that is differentiated: ERPO then costs no forward more than GRPO.
"""

import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from erpo_core.advantages import ERPOSignals, erpo_advantages
from erpo_core.loss import erpo_loss, token_weights
from erpo_core.prompts import stop_token_ids
from erpo_core.trainer.batches import MicroBatch, Scored, TraceGroup
from erpo_core.trainer.config import ERPOConfig
from erpo_core.trainer.guards import SaveAtBoundaries, SkipNonFinite
from erpo_core.trainer.measures import signal_metrics
from erpo_core.trainer.reference import make_reference
from erpo_core.trainer.sampler import EpochSampler
from erpo_core.trainer.sampling import logp_differences, make_sampler
from erpo_core.trainer.scoring import Rollouts, pad_rollouts, score_rollouts, spread
from erpo_core.trainer.state import RunState

SMALL_MODEL = 500_000_000
"""Parameters up to which ``scoring_dtype="auto"`` is float32."""


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
        self.keeps_rollouts = False
        """Whether somebody empties ``rollout_log`` and ``traces``; otherwise only the last generation is kept."""
        self.traces: list[TraceGroup] = []
        self.rollout_log: list[MicroBatch] = []
        self.run_state = RunState()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._step_entropies = torch.zeros(3, dtype=torch.float64)
        # TRL would load a reference by the model's name, or none at all where beta is 0; ERPO always needs its own.
        # Its vLLM merges the adapter into the base, which is our reference.
        kept = {"loss_type": args.loss_type, "beta": args.beta, "use_vllm": args.use_vllm}
        args.loss_type, args.beta, args.use_vllm = "bnpo", 0.0, False
        try:
            super().__init__(model=model, reward_funcs=reward_funcs, args=args, **kwargs)
        finally:
            args.loss_type, args.beta, args.use_vllm = kept["loss_type"], kept["beta"], kept["use_vllm"]
        self.beta = args.beta
        self._check_layout()
        self._reference = make_reference(self.accelerator.unwrap_model(self.model))
        self._engine_of = make_sampler(
            args,
            self.accelerator.unwrap_model(self.model),
            self.processing_class,
            num_processes=self.accelerator.num_processes,
        )
        self._scores_in_float32 = self._resolve_scoring_dtype() == "float32"
        self.add_callback(SkipNonFinite(self))
        self.add_callback(SaveAtBoundaries())

    # --- rollouts

    def _get_train_sampler(self, dataset=None):
        return EpochSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def _tokenize_prompts(self, prompts: list):
        if self._given_ids is None:
            return super()._tokenize_prompts(prompts)
        return self._given_ids, None, {}

    def _prepare_inputs(self, generation_batch):
        cycle = self.args.steps_per_generation * self.num_iterations
        if self._step % cycle == 0 or self._buffered_inputs is None:
            self._buffered_inputs = self._roll_out(generation_batch)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        model = self.accelerator.unwrap_model(self.model)
        unique = [list(ids) for ids in prompt_ids[::num_generations]]
        with self._timed("generate"), self._autocast(self.args.bf16):
            groups = self._engine_of(model).generate(
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
        self._engine_logps = [sample.logps for group in groups for sample in group]
        return [sample.token_ids for group in groups for sample in group], None

    def _generation_seed(self) -> int:
        """A seed of its own for each generation: a resumed run samples what the run never stopped would have."""
        rank = self.accelerator.process_index
        return (self.args.seed * 1_000_003 + self.state.global_step * 1_009 + rank) % 2**31

    def _roll_out(self, examples: list[dict[str, Any]]) -> list[MicroBatch]:
        prompts = [example["prompt"] for example in examples]
        # A column ``prompt_ids`` holds the prompt as it is to be read; otherwise TRL tokenizes ``prompt``.
        self._given_ids = [example["prompt_ids"] for example in examples] if "prompt_ids" in examples[0] else None
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
            step_rows = range(first, min(first + size * window, len(prompts)))
            rollouts = pad_rollouts(prompt_ids[part][:: self.num_generations], completion_ids[part], pad, device)
            judged = ~rewards[part].isnan().to(device)
            batches.append(
                MicroBatch(
                    rollouts=replace(rollouts, mask=rollouts.mask & judged[:, None]),
                    rewards=rewards[part],
                    outcomes=per_function[part, self._outcome_index()],
                    finished=torch.tensor(self._finished[part]),
                    engine_logps=self._engine_logps[part],
                    lengths=[len(ids) for ids in completion_ids[part]],
                    examples=examples[part],
                    completions=[_text(completion) for completion in completions[part]],
                    reward_rows={name: per_function[part, i] for i, name in enumerate(self.reward_func_names)},
                    verdicts=verdicts[part] if verdicts else None,
                    groups_in_step=len(step_rows) // self.num_generations,
                    tokens_in_step=sum(len(completion_ids[row]) for row in step_rows if not rewards[row].isnan()),
                )
            )
        self.rollout_log = [*self.rollout_log, *batches] if self.keeps_rollouts else batches
        if self._measures_noise():
            self._measure_noise(batches[0].rollouts.part(0, self.num_generations))
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

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch. At the end of an optimizer step the running statistics take the step in."""
        before, start = sum(self._seconds.values()), time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        other = sum(self._seconds.values()) - before
        self._seconds["backward"] += time.perf_counter() - start - other
        if self.accelerator.sync_gradients:
            count, total, squares = self._step_entropies.tolist()
            if count and total - total == 0:
                self.run_state.update_entropy(total / count, squares / count, self.args.entropy_ema_decay)
            self._step_entropies.zero_()
        return loss

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
        with self._autocast(self.args.bf16 and not self._scores_in_float32):
            return score_rollouts(policy, rollouts, temperature=self.temperature, share_prompt=shared)

    def _reference_logps(self, policy, rollouts: Rollouts) -> Tensor:
        with self._reference(policy) as reference:
            return self._scores(reference, rollouts).logps

    def _advantages(self, entropies, logps, ref_logps, mask, rewards) -> ERPOSignals:
        args, state = self.args, self.run_state
        self._step_entropies += _sums(entropies[mask])
        # Scores that are not finite make the loss, and so the step, void; here they must only not raise.
        return erpo_advantages(
            entropies.nan_to_num(0.0),
            logps.nan_to_num(0.0),
            ref_logps.nan_to_num(0.0),
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
            entropy_mean=state.entropy_mean if args.entropy_stats == "ema" else None,
            entropy_std=state.entropy_std if args.entropy_stats == "ema" else None,
            gate=args.gate,
            anchor=args.anchor,
            norm=args.norm,
        )

    # --- noise of the progress signal

    @property
    def noise_floor(self) -> float:
        """Buckets whose progress spreads no more than this are silent."""
        wanted = self.args.progress_noise_floor
        return max(2 * self.run_state.noise, 1e-6) if wanted == "auto" else float(wanted)

    def _measures_noise(self) -> bool:
        wanted = self.args.algorithm == "erpo" and self.args.progress_noise_floor == "auto"
        return wanted and self.state.global_step % self.args.noise_floor_every == 0

    @torch.no_grad()
    def _measure_noise(self, group: Rollouts) -> None:
        """The same tokens at another batch size, half of the group at a time: what differs is rounding."""
        if not group.mask.any():
            return
        size = self.num_generations
        step = max(1, size // 2)
        policy = self.accelerator.unwrap_model(self.model)
        with self._timed("noise"), self._deterministic(policy):
            whole = self._scores(policy, group).logps
            parts = [
                self._scores(policy, group.part(start, min(start + step, size))).logps for start in range(0, size, step)
            ]
        self.run_state.noise = self.args.progress_scale * (whole - torch.cat(parts)).std(correction=0).item()

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
        return terms.loss

    # --- records and checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the seconds of each phase summed over the micro-batches since the last call."""
        for phase, seconds in self._seconds.items():
            self._metrics["train"][f"time/{phase}"] = [seconds]
        self._metrics["train"]["erpo/skipped_steps"] = [self.run_state.skipped_steps]
        self._seconds.clear()
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        self.run_state.save(Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}")

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.run_state = RunState.load(Path(checkpoint))

    def _record(self, batch: MicroBatch, scored: Scored, terms) -> None:
        mask = batch.rollouts.mask
        for name, value in signal_metrics(batch, scored, terms, self.num_generations, self.noise_floor).items():
            self._metrics["train"][name].append(value)
        if len(apart := logp_differences(batch.engine_logps, scored.logps, mask)):
            self._metrics["train"]["sampling/logp_difference_mean"].append(apart.mean().item())
            self._metrics["train"]["sampling/logp_difference_max"].append(apart.max().item())
        self._metrics["train"]["erpo/progress_noise"].append(self.run_state.noise)
        self._metrics["train"]["num_active_tokens"] = [mask.sum().item()]
        step = self.state.global_step + 1
        last = step == self.state.max_steps
        if self.keeps_rollouts and self.args.trace_every and (step == 1 or last or step % self.args.trace_every == 0):
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
        self._seconds[phase] += time.perf_counter() - start

    # --- the model

    def _autocast(self, wanted: bool):
        return self.accelerator.autocast() if wanted else nullcontext()

    @contextmanager
    def _deterministic(self, model):
        """Dropout is noise in s: scoring and loss run without it. Layers with no other train mode are not touched."""
        training = model.training
        if not self.args.gradient_checkpointing:
            model.eval()
        yield
        model.train(training)

    def _resolve_scoring_dtype(self) -> str:
        """float32 on the CPU and up to half a billion parameters, where it costs little; erpo-spec section 4."""
        if self.args.scoring_dtype != "auto":
            return self.args.scoring_dtype
        small = self.accelerator.unwrap_model(self.model).num_parameters() <= SMALL_MODEL
        return "float32" if small or self.accelerator.device.type == "cpu" else "bfloat16"

    def _check_layout(self) -> None:
        window = self.args.gradient_accumulation_steps
        if self.args.steps_per_generation % window:
            raise ValueError(
                f"steps_per_generation: {self.args.steps_per_generation} must be a multiple of "
                f"gradient_accumulation_steps ({window}), so that a generation holds whole optimizer steps"
            )
        if self.accelerator.num_processes > 1:
            # The body is called below DDP's wrapper, so the ranks would train apart without a word.
            raise ValueError("num_processes: ERPOTrainer runs in one process; start one per model")


def _sums(values: Tensor) -> Tensor:
    """Count, sum and sum of squares, on the CPU."""
    wide = values.detach().double()
    return torch.stack([torch.tensor(float(len(wide))), wide.sum().cpu(), wide.square().sum().cpu()])


def _text(completion: str | list[dict[str, str]]) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]
