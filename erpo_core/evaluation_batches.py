"""How the answers of an evaluation are sampled: in batches that are laid out before anything is sampled.

A batch's seed comes from what is in it, so that the same request samples the same answers whatever was interrupted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from erpo_core.data.formats import Problem
from erpo_core.errors import RunError
from erpo_core.evaluation_answers import Answer
from erpo_core.generation.base import Sample
from erpo_core.generation.seeds import mixed_seed
from erpo_core.prompts import prompt_ids
from erpo_core.specs.common import PromptSpec
from erpo_core.specs.evaluate import EvaluateSpec


@dataclass(frozen=True)
class Task:
    """A problem with its prompt's token ids. ``group`` is its place in the data set."""

    group: int
    problem: Problem
    ids: list[int]


@dataclass(frozen=True)
class Batch:
    """What is sampled together: the samples from ``first`` to ``first + count`` of each task."""

    tasks: tuple[Task, ...]
    first: int
    count: int
    seed: int

    @property
    def samples(self) -> range:
        """The numbers of the samples."""
        return range(self.first, self.first + self.count)

    @property
    def keys(self) -> list[tuple[str, int]]:
        """(prompt_id, sample) of each answer."""
        return [(task.problem.id, number) for task in self.tasks for number in self.samples]

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids, one list a task."""
        return [task.ids for task in self.tasks]

    def answers(self, groups: Sequence[Sequence[Sample]]) -> list[Answer]:
        """The sampled answers with their problems, problem by problem."""
        return [
            Answer(task.problem, task.group, number, sample)
            for task, group in zip(self.tasks, groups, strict=True)
            for number, sample in zip(self.samples, group, strict=True)
        ]


def make_tasks(problems: Sequence[Problem], tokenizer: Any, prompt: PromptSpec) -> list[Task]:
    """A task for each problem, in the order of the data set."""
    return [
        Task(group, problem, prompt_ids(tokenizer, problem.problem, prompt)) for group, problem in enumerate(problems)
    ]


def lay_out(tasks: Sequence[Task], spec: EvaluateSpec, batch_size: int) -> Iterator[Batch]:
    """Batches of at most ``batch_size`` answers, prompts of like length together; the same for the same request."""
    ordered = sorted(tasks, key=lambda task: (len(task.ids), task.group))
    per_batch = max(1, batch_size // spec.num_samples)
    for start in range(0, len(ordered), per_batch):
        together = tuple(ordered[start : start + per_batch])
        for first in range(0, spec.num_samples, batch_size):
            count = min(batch_size, spec.num_samples - first)
            yield Batch(together, first, count, _seed(spec, together, first))


def longest_of(tasks: Sequence[Task]) -> Task:
    """That of the most prompt tokens."""
    return max(tasks, key=lambda task: len(task.ids))


def check_room(tasks: Sequence[Task], max_completion_length: int, room: int, whose: str) -> None:
    """Raises RunError, ``prompt_too_long``, where a prompt and its answer may take more than ``room`` tokens."""
    longest = longest_of(tasks)
    if len(longest.ids) + max_completion_length > room:
        raise RunError(
            f"the prompt of {longest.problem.id} has {len(longest.ids)} tokens: with max_completion_length "
            f"{max_completion_length} that is more than {whose} {room}",
            code="prompt_too_long",
        )


def _seed(spec: EvaluateSpec, tasks: Sequence[Task], first: int) -> int:
    return mixed_seed(spec.sampling.seed, first, [task.problem.id for task in tasks])
