"""What a trainer makes of the answers: scores of policy and reference, and each token's advantage."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from erpo_core.advantages import ERPOSignals, erpo_advantages, has_contrast, without_shaping
from erpo_core.logits import TokenScores
from erpo_core.loss import top_entropy_mask
from erpo_core.memory import SMALL_MODEL
from erpo_core.trainer import measures, ranks
from erpo_core.trainer.batches import MicroBatch, Scored
from erpo_core.trainer.config import ERPOConfig
from erpo_core.trainer.noise import measure_noise
from erpo_core.trainer.reference import Reference
from erpo_core.trainer.rows import cut_columns, spread_scores, stack_rows
from erpo_core.trainer.scoring import Rollouts, merge_scores, reference_states, score_rollouts, spread
from erpo_core.trainer.sharding import goes_in_step
from erpo_core.trainer.state import RunState
from erpo_core.trainer.totals import Totals


class TokenCredit:
    """A mixin before TRL's trainer: its one advantage an answer becomes one a token."""

    args: ERPOConfig
    accelerator: Accelerator
    beta: float
    run_state: RunState
    _policy: Any
    _reference: Reference
    _totals: Totals
    _of_steps: list[Totals]
    _entropy_sums: list[float]
    _noise_step: int
    _scored_step: int
    """That the policy had made when ``old`` was scored."""
    _scores_in_float32: bool
    _timed: Callable[[str], AbstractContextManager[None]]
    _autocast: Callable[[bool], AbstractContextManager[None]]

    def _forms_credit_in_the_loss(self) -> bool:
        """On-policy, with whole groups in each micro-batch: the forward that is differentiated gives all it takes."""
        on_policy = self.num_iterations == 1 and self.args.steps_per_generation <= self.args.gradient_accumulation_steps
        return on_policy and self.args.per_device_train_batch_size % self.num_generations == 0

    def _score(self, policy, batch: MicroBatch) -> TokenScores:
        """Policy and reference on the active tokens; ``logps`` carries gradient where the caller has it enabled."""

        def score(rollouts: Rollouts) -> TokenScores:
            reference = None
            if self._needs_reference:
                with self._timed("reference"), self._reference.of(policy) as model, self._autocast_scoring():
                    reference = reference_states(model, policy, rollouts)
            with self._timed("forward"):
                return self._scores(policy, rollouts, reference)

        with self._deterministic(policy):
            scores = self._sparing_the_dead(score, batch)
            if self._noise_is_due():
                with self._timed("noise"), torch.no_grad():
                    self._measure_noise(policy, batch.rollouts, scores.logps.detach())
        return scores

    def _score_again(self, policy, batch: MicroBatch) -> tuple[Tensor, Scored]:
        """Log-probabilities (B, T) of the policy as it is now, with gradient, and ``old`` with its entropies.

        The exact KL takes another forward of the reference: of a policy that has moved since then there is none.
        """
        with self._deterministic(policy), self._timed("forward"):
            scores = self._sparing_the_dead(lambda rollouts: self._scores(policy, rollouts), batch)
        norms, entropies, logps = (
            spread(values, batch.rollouts.mask) for values in (scores.leverage_norms, scores.entropies, scores.logps)
        )
        batch.old = replace(batch.old, leverage_norms=norms)
        kls = batch.old.kls if self.state.global_step == self._scored_step else None
        # As in TRL the tokens of highest entropy are those of the policy as it is now.
        advantages = self._final(batch.old.signals, batch.rollouts.mask, entropies)
        return logps, replace(batch.old, entropies=entropies, advantages=advantages, kls=kls)

    def _sparing_the_dead(self, score: Callable[[Rollouts], TokenScores], batch: MicroBatch) -> TokenScores:
        """What ``score`` gives; without a KL term the dead groups have no gradient, and so no graph.

        Ranks that share their weights score together, however many of their groups are dead.
        """
        rollouts = batch.rollouts
        if self.beta > 0 or not torch.is_grad_enabled() or goes_in_step(self._policy):
            return score(rollouts)
        live = self._live_prompts(batch)
        if live.all():
            return score(rollouts)
        with torch.no_grad():
            dead = score(rollouts.of_groups(~live) if live.any() else rollouts)
        if not live.any():
            return dead
        tokens = live.repeat_interleave(rollouts.num_generations)[:, None].expand_as(rollouts.mask)
        return merge_scores(score(rollouts.of_groups(live)), dead, tokens[rollouts.mask])

    def credited_rewards(self, rewards: Tensor, outcomes: Tensor) -> Tensor:
        """(B,) rewards of whole groups as eq. 3 takes them."""
        if self.args.dead_group_on == "total":
            return rewards
        return without_shaping(rewards, outcomes, self.num_generations)

    def _live_prompts(self, batch: MicroBatch) -> Tensor:
        """(prompts,) bool: whose answers have, or are about to get, an advantage."""
        count = len(batch.rollouts.prompts)
        if batch.old is None:
            return has_contrast(self.credited_rewards(batch.rewards, batch.outcomes).view(count, -1))
        return (self._per_token(batch.old.signals, batch.rollouts.mask) != 0).view(count, -1).any(1)

    def _scores(self, policy, rollouts: Rollouts, reference=None) -> TokenScores:
        with self._autocast_scoring():
            return score_rollouts(policy, rollouts, temperature=self.temperature, reference=reference)

    @property
    def _needs_reference(self) -> bool:
        return self.args.algorithm == "erpo" or self.beta > 0

    def _score_in_the_loss(self, policy, batch: MicroBatch) -> tuple[Tensor, Scored]:
        """Log-probabilities (B, T) with gradient, and what follows from them as constants."""
        mask = batch.rollouts.mask
        columns = spread_scores(self._score(policy, batch), mask)
        logps = columns["logps"]
        columns["logps"] = logps.detach()
        names = ("entropies", "logps", "ref_logps")
        known = [columns[name] for name in names]
        signals = self._signals(*known, mask, batch.rewards, batch.outcomes, [self._totals])
        advantages = self._final(signals, mask, columns["entropies"])
        return logps, Scored(**columns, signals=signals, advantages=advantages, gate_stats=self._gate_stats)

    def _score_before_the_loss(self, batches: list[MicroBatch]) -> None:
        """``old`` of each: groups may lie across micro-batches and ranks."""
        self._scored_step = self.state.global_step
        found = [spread_scores(self._score(self._policy, batch), batch.rollouts.mask) for batch in batches]
        columns = [stack_rows([columns[name] for columns in found]) for name in ("entropies", "logps", "ref_logps")]
        mask = stack_rows([batch.rollouts.mask for batch in batches])
        rewards = torch.cat([batch.rewards for batch in batches])
        outcomes = torch.cat([batch.outcomes for batch in batches])
        if len(mask) % self.num_generations:
            *columns, whole, rewards, outcomes = (
                ranks.gather_rows(self.accelerator, values) for values in (*columns, mask, rewards, outcomes)
            )
            # Every rank has the same groups: one of them counts.
            of_steps = self._of_steps if self.accelerator.is_main_process else []
            signals = self._signals(*columns, whole, rewards, outcomes, of_steps)
            signals = ranks.local_signals(self.accelerator, signals, mask)
        else:
            signals = self._signals(*columns, mask, rewards, outcomes, self._of_steps)
        for batch, scores in zip(batches, found, strict=True):
            rows = slice(batch.first_row, batch.first_row + len(batch.rewards))
            own = replace(
                signals, **{name: cut_columns(v[rows], batch.rollouts.mask) for name, v in vars(signals).items()}
            )
            advantages = self._final(own, batch.rollouts.mask, scores["entropies"])
            columns = scores | {"leverage_norms": None}
            batch.old = Scored(**columns, signals=own, advantages=advantages, gate_stats=self._gate_stats)

    def _signals(self, entropies, logps, ref_logps, mask, rewards, outcomes, of_steps: list[Totals]) -> ERPOSignals:
        """Eqs. 3 and 7-10 for whole groups; what is counted of them goes to the steps that are trained on them."""
        args = self.args
        entropy_mean, entropy_std = self._gate_stats or (None, None)
        # Scores that are not finite make the loss, and so the step, void; here they must only not raise.
        signals = erpo_advantages(
            entropies.nan_to_num(0.0),
            logps.nan_to_num(0.0),
            ref_logps.nan_to_num(0.0),
            mask,
            self.credited_rewards(rewards, outcomes),
            num_generations=self.num_generations,
            num_buckets=args.num_buckets,
            gate_scale=args.gate_scale,
            progress_scale=args.progress_scale,
            synthesis_weight=args.synthesis_weight,
            psi_std=args.psi_std,
            stabilizer=args.stabilizer,
            progress_noise_floor=self.noise_floor,
            entropy_mean=entropy_mean,
            entropy_std=entropy_std,
            gate=args.gate,
            anchor=args.anchor,
            norm=args.norm,
        )
        for step, totals in enumerate(of_steps):
            rows = self._rows_of_groups(len(mask), step, len(of_steps))
            of_step = replace(signals, **{name: values[rows] for name, values in vars(signals).items()})
            self._count_groups(totals, rewards[rows], outcomes[rows], of_step, mask[rows])
        live = measures.live_groups(signals.advantages, self.num_generations)
        wide = entropies[mask & live.repeat_interleave(self.num_generations)[:, None]].detach().double()
        for index, value in enumerate((len(wide), wide.sum().item(), wide.square().sum().item())):
            self._entropy_sums[index] += value
        return signals

    def _rows_of_groups(self, count: int, step: int, steps: int) -> Tensor:
        """(B,) bool: the ``count`` rows of all groups of which this step of the generation has an answer or more.

        Rank by rank, and in each the answers of one step after the other's.
        """
        share = self.args.gradient_accumulation_steps * self.args.per_device_train_batch_size
        of_step = torch.arange(count, device=self.accelerator.device) // share % steps == step
        return of_step.view(-1, self.num_generations).any(1).repeat_interleave(self.num_generations)

    def _count_groups(self, totals: Totals, rewards, outcomes, signals: ERPOSignals, mask: Tensor) -> None:
        size = self.num_generations
        measures.count_groups(totals, rewards, outcomes, signals, mask, size)
        if self.args.algorithm == "erpo":
            live = measures.live_groups(signals.advantages, size)
            measures.count_invariants(totals, "", signals.advantages, live, mask, size)

    @property
    def _gate_stats(self) -> tuple[float, float] | None:
        """Moving mean and standard deviation of the entropy; None where the group's own count."""
        state = self.run_state
        if self.args.entropy_stats == "group" or state.entropy_mean is None:
            return None
        return state.entropy_mean, state.entropy_std

    def _per_token(self, signals: ERPOSignals, mask: Tensor) -> Tensor:
        """(B, T) advantages of every token."""
        return signals.group_advantages[:, None] * mask if self.args.algorithm == "grpo" else signals.advantages

    def _final(self, signals: ERPOSignals, mask: Tensor, entropies: Tensor) -> Tensor:
        """(B, T) advantages as the loss takes them."""
        advantages = self._per_token(signals, mask)
        if self.args.top_entropy_quantile < 1:
            # A token without advantage keeps its KL term and its place in the denominators, as in TRL.
            advantages = advantages * self._top_entropies(entropies.detach(), mask)
        if self.args.advantage_clip is not None:
            advantages = advantages.clamp(-self.args.advantage_clip, self.args.advantage_clip)
        return advantages

    def _top_entropies(self, entropies: Tensor, mask: Tensor) -> Tensor:
        """(B, T) bool, of this rank's micro-batch and those that the others have at the same time. All must call it."""
        whole = [ranks.gather_rows(self.accelerator, values) for values in (entropies, mask)]
        return ranks.local_rows(self.accelerator, top_entropy_mask(*whole, self.args.top_entropy_quantile), mask)

    # --- dtype and dropout

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

    # --- noise of the progress signal

    @property
    def noise_floor(self) -> float:
        """Buckets whose progress spreads no more than this are silent."""
        wanted = self.args.progress_noise_floor
        return max(2 * self.run_state.noise, 1e-6) if wanted == "auto" else float(wanted)

    @property
    def noise(self) -> float:
        """As it was measured; NaN where nobody asked for that."""
        return self.run_state.noise if self._measures_noise else math.nan

    @property
    def _measures_noise(self) -> bool:
        return self.args.algorithm == "erpo" and self.args.progress_noise_floor == "auto"

    def _noise_is_due(self) -> bool:
        step, last = self.state.global_step, self.run_state.noise_step
        due = last is None or step - last >= self.args.noise_floor_every
        return self._measures_noise and due and step != self._noise_step

    def _measure_noise(self, policy, rollouts: Rollouts, logps: Tensor) -> None:
        self._noise_step = self.state.global_step
        size, in_step = rollouts.num_generations, goes_in_step(policy)
        if in_step:  # where ranks have unequal parts of groups, the smallest decides how often all of them score
            size = min(ranks.gather_list(self.accelerator, [size]))
        group = rollouts.part(0, size)
        count = int(group.mask.sum())
        noise = measure_noise(lambda part: self._scores(policy, part).logps, group, logps[:count], in_step=in_step)
        found = self.args.progress_scale * ranks.mean_of(self.accelerator, noise)
        # Scores that are not finite tell nothing of rounding: the value before stays, the next step measures again.
        if math.isfinite(found):
            self.run_state.noise, self.run_state.noise_step = found, self._noise_step
