"""Dynamic sampling (DAPO, arXiv 2503.14476): prompts whose answers all have one reward give way to others."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from erpo_core.trainer.batches import Answer

_STEPS_APART = 1_000_003


@dataclass(frozen=True)
class Resampled:
    """Groups, as many as there were, and what they cost: ``skipped_prompts`` were answered and are not trained on."""

    groups: list[list[Answer]]
    rounds: int
    skipped_prompts: int
    resampled_tokens: int
    """Of all answers that were sampled after the first ones."""


def replace_dead_groups(
    groups: Sequence[list[Answer]],
    *,
    has_contrast: Callable[[list[Answer]], bool],
    prompts: Iterator[dict[str, Any]],
    answer: Callable[[list[dict[str, Any]], int], list[list[Answer]]],
    max_rounds: int,
) -> Resampled:
    """Replace groups without contrast by groups with it, in place of the dead ones.

    A round answers as many new prompts as there are dead groups left. It ends when none is left, the prompts are used
    up, or after ``max_rounds``; groups that are dead then stay.

    Args:
        groups: Of all ranks.
        has_contrast: Whether the rewards of a group differ.
        prompts: Rows of the data set that may take part.
        answer: A group for each of some rows, in the round of that number, from 1.
        max_rounds: Bound on the rounds.
    """
    groups, rounds, skipped, tokens = list(groups), 0, 0, 0
    while rounds < max_rounds:
        dead = [place for place, group in enumerate(groups) if not has_contrast(group)]
        fresh = list(islice(prompts, len(dead)))
        if not fresh:
            break
        rounds += 1
        skipped += len(fresh)
        found = answer(fresh, rounds)
        tokens += sum(len(one.sample.token_ids) for group in found for one in group)
        for place, group in zip(dead, filter(has_contrast, found), strict=False):
            groups[place] = group
    return Resampled(groups, rounds, skipped, tokens)


def other_prompts(
    dataset: Sequence[dict[str, Any]], answers: Sequence[Answer], *, seed: int, step: int
) -> Iterator[dict[str, Any]]:
    """Rows whose prompt none of ``answers`` has, each once, in an order that seed and step alone decide.

    The epoch's own order is not touched: a resumed run draws the same, and every rank does.
    """
    taken = [answer.example["prompt"] for answer in answers]
    for index in random.Random(seed * _STEPS_APART + step).sample(range(len(dataset)), len(dataset)):
        row = dataset[index]
        if row["prompt"] not in taken:
            yield row
