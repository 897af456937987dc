"""What a trainer samples: answers, their rewards, and the micro-batches they lie in."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from erpo_core.generation.base import Engine, Sample
from erpo_core.loss import response_weights
from erpo_core.prompts import stop_token_ids
from erpo_core.trainer import ranks
from erpo_core.trainer.batches import MicroBatch
from erpo_core.trainer.config import ERPOConfig
from erpo_core.trainer.rows import prompt_runs
from erpo_core.trainer.sampler import EpochSampler
from erpo_core.trainer.scoring import pad_rollouts
from erpo_core.trainer.totals import Totals


class SampledAnswers:
    """A mixin before TRL's trainer: its generation and its input batches are replaced."""

    args: ERPOConfig
    accelerator: Accelerator
    keeps_rollouts: bool
    """Whether somebody empties ``rollout_log`` and ``traces``; otherwise only the last generation is kept."""
    rollout_log: list[MicroBatch]
    _engine_of: Callable[[Any], Engine]
    _totals: Totals
    _timed: Callable[[str], AbstractContextManager[None]]

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

    def sample(self, prompts: list[list[int]], n: int, *, seed: int) -> list[list[Sample]]:
        """``n`` answers of the policy as it is to each prompt; nothing of the trainer changes."""
        with self._autocast(self.args.bf16):
            return self._engine().generate(
                prompts,
                n=n,
                temperature=self.temperature,
                top_p=self.args.top_p,
                top_k=self.args.top_k or 0,
                max_new_tokens=self.max_completion_length,
                stop_ids=stop_token_ids(self.processing_class),
                seed=seed,
            )

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


def _text(completion: str | list[dict[str, str]]) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]
