"""ERPOTrainer: TRL's GRPOTrainer with token-level advantages.

Data, rewards, optimisation and saving are TRL's and transformers'. Ours are generation (the prompt computed once),
scoring (float32 logits, no dropout, one packed row), the advantages and the loss (eqs. 4, 5). On-policy, the advantages
are formed from the very forward that is differentiated: ERPO then costs no forward more than GRPO.
"""

import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import DistributedType
from torch import Tensor
from trl import GRPOTrainer

from erpo_core.advantages import ERPOSignals, erpo_advantages
from erpo_core.generation.base import Engine, Sample
from erpo_core.logits import TokenScores
from erpo_core.loss import LossTerms, erpo_loss, response_weights, top_entropy_mask
from erpo_core.memory import SMALL_MODEL
from erpo_core.packing import packed_attention, supports_packing
from erpo_core.prompts import stop_token_ids
from erpo_core.trainer import measures, ranks
from erpo_core.trainer.batches import MicroBatch, Scored, TraceGroup
from erpo_core.trainer.config import ERPOConfig
from erpo_core.trainer.guards import SaveAtBoundaries, SkipNonFinite
from erpo_core.trainer.noise import measure_noise
from erpo_core.trainer.reference import Reference
from erpo_core.trainer.rows import cut_columns, prompt_runs, spread_scores, stack_rows
from erpo_core.trainer.sampler import EpochSampler
from erpo_core.trainer.sampling import logp_differences, make_sampler
from erpo_core.trainer.saving import WholeCheckpoints
from erpo_core.trainer.scoring import (
    Rollouts,
    body_of,
    pad_rollouts,
    reference_states,
    score_rollouts,
    spread,
)
from erpo_core.trainer.state import RunState
from erpo_core.trainer.totals import Totals


class ERPOTrainer(WholeCheckpoints, GRPOTrainer):
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
        self.removed_checkpoints: list[int] = []
        self.run_state = RunState()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._totals = Totals()
        self._entropy_sums = [0.0, 0.0, 0.0]
        self._noise_step = -1
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
        self._reference = Reference(self._policy)
        self._engine_of = make_sampler(
            args, self._policy, self.processing_class, num_processes=self.accelerator.num_processes
        )
        self._scores_in_float32 = self._resolve_scoring_dtype() == "float32"
        self.add_callback(SkipNonFinite(self))
        self.add_callback(SaveAtBoundaries())

    @property
    def _policy(self):
        """The model below DDP's wrapper."""
        return self.accelerator.unwrap_model(self.model)

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
        groups = prompt_runs(prompt_ids, num_generations)
        with self._timed("generate"):
            found = self.sample([list(ids) for ids in prompt_ids[::groups]], groups, seed=self._generation_seed())
        samples = [sample for group in found for sample in group]
        self._samples = samples
        return [sample.token_ids for sample in samples], None

    def sample(self, prompts: list[list[int]], n: int, *, seed: int, **changes: float) -> list[list[Sample]]:
        """``n`` answers of the policy as it is to each prompt; nothing of the trainer changes.

        ``changes``: how they are sampled, in :meth:`erpo_core.generation.base.Engine.generate`'s names, where that is
        not as in training.
        """
        sampling = {
            "temperature": self.temperature,
            "top_p": self.args.top_p,
            "top_k": self.args.top_k or 0,
            "max_new_tokens": self.max_completion_length,
        }
        with self._autocast(self.args.bf16):
            stop_ids = stop_token_ids(self.processing_class)
            return self._engine().generate(prompts, n=n, stop_ids=stop_ids, seed=seed, **sampling | changes)

    def _engine(self) -> Engine:
        """Samples from the policy as it is now."""
        return self._engine_of(self._policy)

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
        batches = self._micro_batches(examples, prompt_ids, completion_ids, completions, per_function)
        self.rollout_log = [*self.rollout_log, *batches] if self.keeps_rollouts else batches
        if not self._forms_credit_in_the_loss():
            with torch.no_grad():
                self._score_before_the_loss(batches)
        return batches

    def _micro_batches(self, examples, prompt_ids, completion_ids, completions, per_function) -> list[MicroBatch]:
        count, size = len(examples), self.args.per_device_train_batch_size
        start = self.accelerator.process_index * count
        per_function = per_function[start : start + count]
        rewards = self._total_rewards(per_function)
        judged = ~rewards.isnan()
        lengths = torch.tensor([len(ids) for ids in completion_ids], device=judged.device) * judged
        weights = response_weights(
            ranks.gather_rows(self.accelerator, lengths).view(-1, count),
            self.accelerator.process_index,
            loss_type=self.args.loss_type,
            num_generations=self.num_generations,
            micro_batch=size,
            accumulation=self.args.gradient_accumulation_steps,
        )
        reports = int(self.accelerator.is_main_process)
        self._totals.add("completions/sampled_tokens", sum(map(len, completion_ids)), reports)
        verdicts = self._last_verdicts()
        batches = []
        for first in range(0, count, size):
            part = slice(first, first + size)
            per_prompt = prompt_runs(prompt_ids[part], self.num_generations)
            rollouts = pad_rollouts(
                prompt_ids[part][::per_prompt],
                completion_ids[part],
                self.processing_class.pad_token_id,
                self.accelerator.device,
            )
            batches.append(
                MicroBatch(
                    rollouts=replace(rollouts, mask=rollouts.mask & judged[part, None]),
                    weights=weights[part],
                    rewards=rewards[part],
                    outcomes=per_function[part, self._outcome_index()],
                    finished=torch.tensor([sample.finished for sample in self._samples[part]]),
                    engine_logps=[sample.logps for sample in self._samples[part]],
                    lengths=[len(ids) for ids in completion_ids[part]],
                    examples=examples[part],
                    completions=[_text(completion) for completion in completions[part]],
                    reward_rows={name: per_function[part, i] for i, name in enumerate(self.reward_func_names)},
                    first_row=first,
                    verdicts=verdicts[part] if verdicts else None,
                )
            )
        return batches

    def _total_rewards(self, per_function: Tensor) -> Tensor:
        """(B,) weighted sums. A response that no function judged is NaN: it is left out of its group."""
        for index, name in enumerate(self.reward_func_names):
            judged = per_function[:, index]
            self._totals.add_values(f"rewards/{name}", judged[~judged.isnan()])
        weights = self.reward_weights.to(per_function.device)
        return (per_function * weights).nansum(1).masked_fill(per_function.isnan().all(1), torch.nan)

    def _outcome_index(self) -> int:
        names = self.reward_func_names
        return names.index(self.args.outcome_reward) if self.args.outcome_reward in names else 0

    def _last_verdicts(self) -> list[str] | None:
        for function in self.reward_funcs:
            verdicts = getattr(function, "last_verdicts", None)
            if verdicts:
                return [str(verdict) for verdict in verdicts]
        return None

    def _forms_credit_in_the_loss(self) -> bool:
        """On-policy, with whole groups in each micro-batch: the forward that is differentiated gives all it takes."""
        on_policy = self.num_iterations == 1 and self.args.steps_per_generation <= self.args.gradient_accumulation_steps
        return on_policy and self.args.per_device_train_batch_size % self.num_generations == 0

    # --- scoring and advantages

    def _score(self, policy, batch: MicroBatch) -> TokenScores:
        """Policy and reference on the active tokens; ``logps`` carries gradient where the caller has it enabled."""
        reference = None
        with self._deterministic(policy):
            if self._needs_reference:
                with self._timed("reference"), self._reference.of(policy) as model, self._autocast_scoring():
                    reference = reference_states(model, policy, batch.rollouts)
            with self._timed("forward"):
                scores = self._scores(policy, batch.rollouts, reference)
            if self._noise_is_due():
                with self._timed("noise"), torch.no_grad():
                    self._measure_noise(policy, batch.rollouts, scores.logps.detach())
        return scores

    def _scores(self, policy, rollouts: Rollouts, reference=None) -> TokenScores:
        with self._autocast_scoring():
            return score_rollouts(policy, rollouts, temperature=self.temperature, reference=reference)

    @property
    def _needs_reference(self) -> bool:
        return self.args.algorithm == "erpo" or self.beta > 0

    def _score_before_the_loss(self, batches: list[MicroBatch]) -> None:
        """``old`` of each: groups may lie across micro-batches and ranks."""
        found = [spread_scores(self._score(self._policy, batch), batch.rollouts.mask) for batch in batches]
        masks = [batch.rollouts.mask for batch in batches]
        width = max(mask.shape[1] for mask in masks)
        columns = [
            stack_rows([columns[name] for columns in found], width) for name in ("entropies", "logps", "ref_logps")
        ]
        mask, rewards = stack_rows(masks, width), torch.cat([batch.rewards for batch in batches])
        outcomes = torch.cat([batch.outcomes for batch in batches])
        if len(mask) % self.num_generations:
            *columns, whole, rewards, outcomes = (
                ranks.gather_rows(self.accelerator, values) for values in (*columns, mask, rewards, outcomes)
            )
            signals = ranks.local_signals(self.accelerator, self._signals(*columns, whole, rewards, outcomes), mask)
        else:
            signals = self._signals(*columns, mask, rewards, outcomes)
        for batch, scores in zip(batches, found, strict=True):
            rows = slice(batch.first_row, batch.first_row + len(batch.rewards))
            own = replace(
                signals, **{name: cut_columns(v[rows], batch.rollouts.mask) for name, v in vars(signals).items()}
            )
            advantages = self._final(own, batch.rollouts.mask, scores["entropies"])
            batch.old = Scored(**scores, signals=own, advantages=advantages)

    def _signals(self, entropies, logps, ref_logps, mask, rewards, outcomes) -> ERPOSignals:
        """Eqs. 3 and 7-10 for whole groups, and what is counted of them."""
        args, state = self.args, self.run_state
        # Scores that are not finite make the loss, and so the step, void; here they must only not raise.
        signals = erpo_advantages(
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
        measures.count_groups(self._totals, rewards, outcomes, signals, mask, self.num_generations)
        live = measures.live_groups(signals.advantages, self.num_generations)
        if args.algorithm == "erpo":
            measures.count_invariants(self._totals, "", signals.advantages, live, mask, self.num_generations)
        wide = entropies[mask & live.repeat_interleave(self.num_generations)[:, None]].detach().double()
        for index, value in enumerate((len(wide), wide.sum().item(), wide.square().sum().item())):
            self._entropy_sums[index] += value
        return signals

    def _final(self, signals: ERPOSignals, mask: Tensor, entropies: Tensor) -> Tensor:
        """(B, T) advantages as the loss takes them."""
        advantages = signals.advantages
        if self.args.algorithm == "grpo":
            advantages = signals.group_advantages[:, None] * mask
        # A token without advantage keeps its KL term and its place in the denominators, as in TRL.
        advantages = advantages * top_entropy_mask(entropies.detach(), mask, self.args.top_entropy_quantile)
        if self.args.advantage_clip is not None:
            advantages = advantages.clamp(-self.args.advantage_clip, self.args.advantage_clip)
        return advantages

    # --- noise of the progress signal

    @property
    def noise_floor(self) -> float:
        """Buckets whose progress spreads no more than this are silent."""
        wanted = self.args.progress_noise_floor
        return max(2 * self.run_state.noise, 1e-6) if wanted == "auto" else float(wanted)

    def _noise_is_due(self) -> bool:
        wanted = self.args.algorithm == "erpo" and self.args.progress_noise_floor == "auto"
        step = self.state.global_step
        return wanted and step % self.args.noise_floor_every == 0 and step != self._noise_step

    def _measure_noise(self, policy, rollouts: Rollouts, logps: Tensor) -> None:
        self._noise_step = self.state.global_step
        group = rollouts.part(0, rollouts.num_generations)
        count = int(group.mask.sum())
        noise = measure_noise(lambda part: self._scores(policy, part).logps, group, logps[:count]) if count else 0.0
        self.run_state.noise = self.args.progress_scale * ranks.mean_of(self.accelerator, noise)

    # --- loss

    def _compute_loss(self, model, inputs: MicroBatch) -> Tensor:
        batch, policy = inputs, self.accelerator.unwrap_model(model)
        mask = batch.rollouts.mask
        if batch.old is None:
            columns = spread_scores(self._score(policy, batch), mask)
            logps = columns["logps"]
            columns["logps"] = logps.detach()
            names = ("entropies", "logps", "ref_logps")
            signals = self._signals(*(columns[name] for name in names), mask, batch.rewards, batch.outcomes)
            advantages = self._final(signals, mask, columns["entropies"])
            scored = Scored(**columns, signals=signals, advantages=advantages)
        else:
            scored = batch.old
            with self._deterministic(policy), self._timed("forward"):
                logps = spread(self._scores(policy, batch.rollouts).logps, mask)
        terms = erpo_loss(
            logps,
            scored.logps,
            scored.ref_logps if self._needs_reference else None,
            scored.advantages,
            batch.weights[:, None] * mask,
            epsilon=self.args.epsilon,
            epsilon_high=self.args.epsilon if self.args.epsilon_high is None else self.args.epsilon_high,
            beta=self.beta,
        )
        batch.last_scored = scored
        self._record(batch, scored, terms)
        if self.args.gradient_checkpointing and supports_packing(body_of(policy)):
            self._until_backward.enter_context(packed_attention(policy.config))
        return terms.loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch. At the end of an optimizer step the ranks' gradients and statistics come together."""
        before, start = sum(self._seconds.values()), time.perf_counter()
        with ExitStack() as self._until_backward:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            ranks.sum_gradients(self.accelerator, self._policy)
            count, total, squares = ranks.total_of(self.accelerator, self._entropy_sums)
            if count and total - total == 0:
                self.run_state.update_entropy(total / count, squares / count, self.args.entropy_ema_decay)
            self._entropy_sums = [0.0, 0.0, 0.0]
        other = sum(self._seconds.values()) - before
        self._seconds["backward"] += time.perf_counter() - start - other
        # The logs show the ranks' mean of what is this rank's share of a sum.
        return loss * self.accelerator.num_processes

    # --- records

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with what the steps since the last call have counted on all ranks."""
        if self._totals:
            with self._timed("log"):
                found = measures.step_metrics(ranks.gather_totals(self.accelerator, self._totals), self.noise_floor)
            if not self._needs_reference:
                found = {name: v for name, v in found.items() if name not in measures.OF_REFERENCE}
            found["erpo/progress_noise"] = self.run_state.noise
            found["erpo/skipped_steps"] = self.run_state.skipped_steps
            found |= {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
            for name, value in found.items():
                self._metrics["train"][name] = [value]
            self._totals = Totals()
            self._seconds.clear()
        super().log(logs, start_time)

    def _record(self, batch: MicroBatch, scored: Scored, terms: LossTerms) -> None:
        measures.count_batch(self._totals, batch, scored, terms)
        apart = logp_differences(batch.engine_logps, scored.logps, batch.rollouts.mask)
        self._totals.add_values("sampling/logp_difference_mean", apart)
        if len(apart):
            self._totals.peak("sampling/logp_difference_max", apart.max().item())
        whole = len(batch.rewards) % self.num_generations == 0
        if whole and self.args.algorithm == "erpo":
            applied = scored.advantages.masked_fill(terms.clipped_low | terms.clipped_high, 0.0)
            live = measures.live_groups(scored.signals.advantages, self.num_generations)
            measures.count_invariants(
                self._totals, "_applied", applied, live, batch.rollouts.mask, self.num_generations
            )
        room = self.args.trace_groups - batch.first_row // self.num_generations
        if whole and room > 0 and self._traces_this_step():
            self.traces.append(TraceGroup(batch, scored, self.noise_floor, self.state.global_step + 1, room))

    def _traces_this_step(self) -> bool:
        step, every = self.state.global_step + 1, self.args.trace_every
        return self.keeps_rollouts and bool(every) and (step in (1, self.state.max_steps) or step % every == 0)

    # --- the model

    @contextmanager
    def _timed(self, phase: str):
        start = time.perf_counter()
        yield
        self._seconds[phase] += time.perf_counter() - start

    def _autocast(self, wanted: bool):
        return self.accelerator.autocast() if wanted else nullcontext()

    def _autocast_scoring(self):
        return self._autocast(self.args.bf16 and not self._scores_in_float32)

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
        small = self._policy.num_parameters() <= SMALL_MODEL
        return "float32" if small or self.accelerator.device.type == "cpu" else "bfloat16"

    def _check_layout(self) -> None:
        window = self.args.gradient_accumulation_steps
        if self.args.steps_per_generation % window:
            raise ValueError(
                f"steps_per_generation: {self.args.steps_per_generation} must be a multiple of "
                f"gradient_accumulation_steps ({window}), so that a generation holds whole optimizer steps"
            )
        kind = self.accelerator.distributed_type
        if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
            raise ValueError(
                f"distributed_type: {kind.value} shards the weights, which ERPOTrainer does not support; use DDP"
            )


def _text(completion: str | list[dict[str, str]]) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]
