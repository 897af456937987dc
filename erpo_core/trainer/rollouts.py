"""What a trainer samples: answers, their rewards, and the micro-batches they lie in."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from erpo_core.advantages import has_contrast
from erpo_core.generation.base import Engine, Sample, Watch
from erpo_core.generation.seeds import mixed_seed
from erpo_core.loss import response_weights
from erpo_core.prompts import stop_token_ids
from erpo_core.trainer import measures, ranks
from erpo_core.trainer.batches import Answer, MicroBatch
from erpo_core.trainer.config import ERPOConfig
from erpo_core.trainer.resampling import other_prompts, replace_dead_groups
from erpo_core.trainer.rows import pad_logps, prompt_runs
from erpo_core.trainer.sampler import EpochSampler
from erpo_core.trainer.sampling import Sampler
from erpo_core.trainer.scoring import pad_rollouts
from erpo_core.trainer.totals import Totals


class SampledAnswers:
    """A mixin before TRL's trainer: its generation and its input batches are replaced."""

    args: ERPOConfig
    accelerator: Accelerator
    keeps_rollouts: bool
    """Whether somebody empties ``rollout_log`` and ``traces``; otherwise only the last generation is kept."""
    keeps_traces: bool
    """Whether token traces are taken for one of the ranks that keep; on all ranks alike."""
    rollout_log: list[MicroBatch]
    watch: Watch | None = None
    """Told how far this rank's answers of a step are."""
    credited_rewards: Callable[[Tensor, Tensor], Tensor]
    _policy: Any
    _engine_of: Sampler
    _resample_round = 0
    """Above 0 while dead groups are replaced."""
    _pending_extra_logs: dict[str, list[Any]]
    _totals: Totals
    _of_steps: list[Totals]
    """What holds of the answers at hand, by the optimizer step of the generation that is trained on them."""
    _of_step: Totals
    """Of those, the one at hand."""
    _timed: Callable[[str], AbstractContextManager[None]]
    _autocast_scoring: Callable[[], AbstractContextManager[None]]

    def _get_train_sampler(self, dataset=None):
        self._order = EpochSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )
        return self._order

    def _tokenize_prompts(self, prompts: list):
        if self._given_ids is None:
            return super()._tokenize_prompts(prompts)
        return self._given_ids, None, {}

    def _prepare_inputs(self, generation_batch):
        cycle = self.args.steps_per_generation * self.num_iterations
        if self._step % cycle == 0 or self._buffered_inputs is None:
            self._buffered_inputs = self._roll_out(generation_batch)
        place = self._step % self.args.steps_per_generation
        self._of_step = self._of_steps[place // self.args.gradient_accumulation_steps]
        return self._buffered_inputs[place]

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        groups = prompt_runs(prompt_ids, num_generations)
        with self._timed("generate"):
            prompts, seed = [list(ids) for ids in prompt_ids[::groups]], self._generation_seed()
            found = self.sample(prompts, groups, seed=seed, watch=self.watch)
        samples = [sample for group in found for sample in group]
        self._samples = samples
        return [sample.token_ids for sample in samples], None

    def sample(
        self, prompts: list[list[int]], n: int, *, seed: int, watch: Watch | None = None, **changes: float
    ) -> list[list[Sample]]:
        """``n`` answers of the policy as it is to each prompt; nothing of the trainer changes. All ranks must call it.

        Args:
            watch: told how far they are; LeftEarlyError, which it may raise on any rank, is raised on all.
            changes: how they are sampled, in :meth:`erpo_core.generation.base.Engine.generate`'s names, where that is
                not as in training.
        """
        sampling = {
            "temperature": self.temperature,
            "top_p": self.args.top_p,
            "top_k": self.args.top_k or 0,
            "max_new_tokens": self.max_completion_length,
        }
        with self._autocast_scoring():  # the policy that is sampled is the one that is scored, but for its copies
            engine = self._engine()
            stop_ids = stop_token_ids(self.processing_class, self._policy)
            call = {"n": n, "stop_ids": stop_ids, "seed": seed, **sampling, **changes}
            return ranks.sampled_together(self.accelerator, engine, watch, prompts, **call)

    def close(self) -> None:
        """After the last answer: a vLLM server forgets the adapter. Sampling again is possible, and lends it anew."""
        self._engine_of.close()

    def _engine(self) -> Engine:
        """Samples from the policy as it is now."""
        return self._engine_of(self._policy)

    def _generation_seed(self) -> int:
        """Each generation and rank has its own: a resumed run samples what the run never stopped would have."""
        return mixed_seed(self.args.seed, self.state.global_step, self.accelerator.process_index, self._resample_round)

    def _roll_out(self, examples: list[dict[str, Any]]) -> list[MicroBatch]:
        answers = self._answer(examples)
        if self.args.dynamic_sampling:
            answers = self._replace_dead_groups(answers)
        steps = self.args.steps_per_generation // self.args.gradient_accumulation_steps
        self._of_steps = [Totals() for _ in range(steps)]
        batches = self._micro_batches(answers)
        self.rollout_log = [*self.rollout_log, *batches] if self.keeps_rollouts else batches
        if not self._forms_credit_in_the_loss():
            with torch.no_grad():
                self._score_before_the_loss(batches)
        return batches

    def _answer(self, examples: list[dict[str, Any]]) -> list[Answer]:
        """One answer to each of this rank's rows, judged. Every rank has as many rows."""
        prompts = [example["prompt"] for example in examples]
        # A column ``prompt_ids`` holds the prompt as it is to be read; otherwise TRL tokenizes ``prompt``.
        self._given_ids = [example["prompt_ids"] for example in examples] if "prompt_ids" in examples[0] else None
        prompt_ids, completion_ids, _, completions, *_ = self._generate(prompts)
        told = {name: len(values) for name, values in self._pending_extra_logs.items()}
        with self._timed("rewards"):
            per_function = self._calculate_rewards(examples, prompts, completions, completion_ids)
        rewards = per_function[ranks.local_slice(self.accelerator, len(examples))].tolist()
        verdicts = self._last_verdicts() or [None] * len(examples)
        generations = int(self.accelerator.is_main_process and self._resample_round == 0)
        self._totals.add("completions/sampled_tokens", sum(map(len, completion_ids)), generations)
        extras = self._extras(told, len(examples))
        columns = (examples, prompt_ids, self._samples, completions, rewards, verdicts, extras)
        return [Answer(*row) for row in zip(*columns, strict=True)]

    def _replace_dead_groups(self, answers: list[Answer]) -> list[Answer]:
        """This rank's rows of the generation batch without the prompts that nothing can be learnt from."""
        whole = ranks.gather_list(self.accelerator, answers)
        found = replace_dead_groups(
            self._groups_of(whole),
            has_contrast=self._is_live,
            prompts=other_prompts(self.train_dataset, whole, seed=self.args.seed, step=self.state.global_step),
            answer=self._answer_together,
            max_rounds=self.args.max_resample_rounds,
        )
        self._totals.add("sampling/resample_rounds", found.rounds, 1)
        self._totals.add("sampling/skipped_prompts", found.skipped_prompts, 1)
        self._totals.add("sampling/resampled_tokens", found.resampled_tokens, 1)
        rows = [answer for group in found.groups for answer in group]
        return rows[ranks.local_slice(self.accelerator, len(answers))]

    def _is_live(self, group: list[Answer]) -> bool:
        outcomes = self._per_function(group)[:, self._outcome_index()]
        return bool(has_contrast(self.credited_rewards(self._total_rewards(group), outcomes)[None]).item())

    def _answer_together(self, examples: list[dict[str, Any]], round_number: int) -> list[list[Answer]]:
        """A group for each example; the ranks share the work evenly, and the last row is repeated to fill it up."""
        rows = [example for example in examples for _ in range(self.num_generations)]
        share = ceil(len(rows) / self.accelerator.num_processes)
        filled = rows + rows[-1:] * (share * self.accelerator.num_processes - len(rows))
        self._resample_round = round_number
        found = self._answer(filled[ranks.local_slice(self.accelerator, share)])
        self._resample_round = 0
        return self._groups_of(ranks.gather_list(self.accelerator, found)[: len(rows)])

    def _groups_of(self, answers: list[Answer]) -> list[list[Answer]]:
        return [answers[first : first + self.num_generations] for first in range(0, len(answers), self.num_generations)]

    def _micro_batches(self, answers: list[Answer]) -> list[MicroBatch]:
        count, size = len(answers), self.args.per_device_train_batch_size
        rewards = self._total_rewards(answers)
        share = count // len(self._of_steps)
        for step, totals in enumerate(self._of_steps):
            part = slice(step * share, (step + 1) * share)
            self._count_answers(totals, answers[part], rewards[part])
        judged = ~rewards.isnan()
        lengths = torch.tensor([len(answer.sample.token_ids) for answer in answers], device=judged.device) * judged
        weights = response_weights(
            ranks.gather_rows(self.accelerator, lengths).view(-1, count),
            self.accelerator.process_index,
            loss_type=self.args.loss_type,
            num_generations=self.num_generations,
            micro_batch=size,
            accumulation=self.args.gradient_accumulation_steps,
        )
        return [
            self._micro_batch(answers[first : first + size], first, rewards, weights) for first in range(0, count, size)
        ]

    def _micro_batch(self, answers: list[Answer], first: int, rewards: Tensor, weights: Tensor) -> MicroBatch:
        part = slice(first, first + len(answers))
        prompt_ids = [answer.prompt_ids for answer in answers]
        rollouts = pad_rollouts(
            prompt_ids[:: prompt_runs(prompt_ids, self.num_generations)],
            [answer.sample.token_ids for answer in answers],
            self.processing_class.pad_token_id,
            self.accelerator.device,
        )
        per_function = self._per_function(answers)
        return MicroBatch(
            rollouts=replace(rollouts, mask=rollouts.mask & ~rewards[part, None].isnan()),
            weights=weights[part],
            rewards=rewards[part],
            outcomes=per_function[:, self._outcome_index()],
            finished=torch.tensor([answer.sample.finished for answer in answers]),
            engine_logps=pad_logps([answer.sample.logps for answer in answers], rollouts.mask),
            lengths=[len(answer.sample.token_ids) for answer in answers],
            examples=[answer.example for answer in answers],
            completions=[_text(answer.completion) for answer in answers],
            reward_rows={name: per_function[:, i] for i, name in enumerate(self.reward_func_names)},
            first_row=first,
            verdicts=[answer.verdict for answer in answers] if answers[0].verdict else None,
            extras=[answer.extra for answer in answers],
        )

    def _count_answers(self, totals: Totals, answers: list[Answer], rewards: Tensor) -> None:
        measures.count_completions(totals, [answer.sample for answer in answers])
        measures.count_verdicts(totals, [answer.verdict for answer in answers])
        by_function = zip(self.reward_func_names, self._per_function(answers).unbind(1), strict=True)
        measures.count_rewards(totals, rewards, dict(by_function))

    def _per_function(self, answers: list[Answer]) -> Tensor:
        """(B, functions) rewards."""
        return torch.tensor([answer.rewards for answer in answers], device=self.accelerator.device)

    def _total_rewards(self, answers: list[Answer]) -> Tensor:
        """(B,) weighted sums. A response that no function judged is NaN: it is left out of its group."""
        per_function = self._per_function(answers)
        weights = self.reward_weights.to(per_function.device)
        return (per_function * weights).nansum(1).masked_fill(per_function.isnan().all(1), torch.nan)

    def _outcome_index(self) -> int:
        names = self.reward_func_names
        return names.index(self.args.outcome_reward) if self.args.outcome_reward in names else 0

    def _extras(self, told: dict[str, int], count: int) -> list[dict[str, Any]]:
        """Of each of these answers what reward functions have given to ``log_extra``, where ``told`` was known before.

        A column that has not one value for each answer is of no answer in particular.
        """
        new = {name: values[told.get(name, 0) :] for name, values in self._pending_extra_logs.items()}
        columns = {name: values for name, values in new.items() if len(values) == count}
        return [{name: values[row] for name, values in columns.items()} for row in range(count)]

    def _last_verdicts(self) -> list[str] | None:
        for function in self.reward_funcs:
            verdicts = getattr(function, "last_verdicts", None)
            if verdicts:
                return [str(verdict) for verdict in verdicts]
        return None


def _text(completion: str | list[dict[str, str]]) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]
