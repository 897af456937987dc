"""Before step 1: a few prompts are answered and scored, and the job fails early where nothing can be learnt.

Nothing can be learnt where no group's rewards differ: then every advantage is 0. Prompts are drawn a generation batch
at a time until a group has spread, at most 16 of them: a healthy job pays for one batch. The order of the prompts and
the answers come from generators of their own, and the global ones are put back: training is the same with or without.
"""

import math
import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from erpo_core.advantages import has_contrast
from erpo_core.errors import RunError
from erpo_core.generation.base import watch_and_leave
from erpo_core.job import Stop
from erpo_core.records import Event, Progress, Sink
from erpo_core.rewards.answers import has_answer
from erpo_core.trainer import ranks
from erpo_core.trainer.randomness import RandomState

if TYPE_CHECKING:
    from erpo_core.trainer.trainer import ERPOTrainer

MAX_PROMPTS = 16
_SEED_APART = 7_919
_ODD_SHARE = 0.9
_WANTS_BOX = ("accuracy", "boxed_format")


@dataclass(frozen=True)
class Findings:
    """Counts over the answers sampled. ``right``: by the outcome reward."""

    prompts: int = 0
    answers: int = 0
    truncated: int = 0
    boxed: int = 0
    right: int = 0
    groups_with_spread: int = 0

    def __add__(self, other: "Findings") -> "Findings":
        mine, others = asdict(self), asdict(other)
        return Findings(**{name: mine[name] + others[name] for name in mine})

    def shares(self) -> dict[str, float | int]:
        """What an event carries."""
        answers = max(1, self.answers)
        return {
            "prompts": self.prompts,
            "answers": self.answers,
            "truncated": self.truncated / answers,
            "boxed": self.boxed / answers,
            "right": self.right / answers,
            "groups_with_spread": self.groups_with_spread,
        }


def run_preflight(trainer: "ERPOTrainer", sink: Sink, stop: Stop) -> None:
    """Emit ``preflight.passed`` with what this rank saw, or fail; on all ranks alike. All must call it.

    Raises:
        LeftEarlyError: asked to leave.
        RunError: ``preflight_failed``: no group's rewards differ; the message says why, as far as that is seen.
    """
    rows = trainer.train_dataset
    order = random.Random(trainer.args.seed).sample(range(len(rows)), min(MAX_PROMPTS, len(rows)))
    size = trainer.args.generation_batch_size // trainer.num_generations
    found, spread = Findings(), 0.0
    with RandomState.current().restored():
        for start in range(0, len(order), size):
            sink.emit(Progress("generate", start, len(order)))
            found += _look_at(trainer, [rows[index] for index in order[start : start + size]], start, stop)
            # Every rank asks the same, and may see other rewards: a check that timed out, a reward that draws.
            spread = ranks.total_of(trainer.accelerator, [float(found.groups_with_spread)])[0]
            if spread:
                break
    wants_box = any(name.startswith(_WANTS_BOX) for name in trainer.reward_func_names)
    if spread:
        sink.emit(_passed(found, wants_box))
    else:
        reasons = why_nothing_is_learnt(found, wants_box, trainer.max_completion_length)
        sink.emit(Event("preflight.failed", _told(found), "error", found.shares() | {"reasons": list(reasons)}))
        raise RunError(
            f"nothing can be learnt: {'; '.join(reasons.values())}. `preflight: false` trains all the same",
            code="preflight_failed",
        )


def why_nothing_is_learnt(found: Findings, wants_box: bool, length: int) -> dict[str, str]:
    """Reasons by their names; the missing spread is always one."""
    reasons = {"no_reward_spread": f"the rewards of the answers to a prompt never differ ({found.prompts} prompts)"}
    if found.truncated == found.answers:
        reasons["all_truncated"] = f"every answer is cut at max_completion_length ({length} tokens): raise it"
    if wants_box and found.boxed == 0:
        reasons["nothing_boxed"] = "no answer is boxed: show the form in prompt.worked_examples or prompt.instruction"
    elif found.right == 0:
        reasons["all_wrong"] = "every answer is wrong: take easier problems or a stronger model"
    elif found.right == found.answers:
        reasons["all_right"] = "every answer is right: take harder problems"
    return reasons


def _passed(found: Findings, wants_box: bool) -> Event:
    shares = found.shares()
    odd = shares["truncated"] > _ODD_SHARE or (wants_box and shares["boxed"] < 1 - _ODD_SHARE)
    return Event("preflight.passed", _told(found), "warn" if odd else "info", shares)


def _told(found: Findings) -> str:
    shares = found.shares()
    return (
        f"{found.answers} answers to {found.prompts} prompts: {shares['truncated']:.0%} truncated, "
        f"{shares['boxed']:.0%} boxed, {shares['right']:.0%} right; rewards differ in {found.groups_with_spread} groups"
    )


def _look_at(trainer: "ERPOTrainer", rows: list[dict[str, Any]], start: int, stop: Stop) -> Findings:
    """Answers of the policy to some prompts, a group each."""
    count = trainer.num_generations
    seed = (trainer.args.seed * 1_000_003 + _SEED_APART + start) % 2**31
    groups = trainer.sample([list(row["prompt_ids"]) for row in rows], count, seed=seed, watch=watch_and_leave(stop))
    samples = [sample for group in groups for sample in group]
    ids = [sample.token_ids for sample in samples]
    texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    rewards, outcomes = _rewards(trainer, [row for row in rows for _ in range(count)], texts, ids)
    credited = trainer.credited_rewards(torch.tensor(rewards), torch.tensor(outcomes))
    return Findings(
        prompts=len(rows),
        answers=len(samples),
        truncated=sum(not sample.finished for sample in samples),
        boxed=sum(map(has_answer, texts)),
        right=sum(outcome > 0 for outcome in outcomes),
        groups_with_spread=int(has_contrast(credited.view(-1, count)).sum()),
    )


def _rewards(
    trainer: "ERPOTrainer", rows: list[dict[str, Any]], texts: list[str], ids: list[list[int]]
) -> tuple[list[float], list[float]]:
    """The weighted sum over the reward functions, NaN where none judged, and the outcome reward."""
    prompts = [row["prompt"] for row in rows]
    completions = texts
    if not isinstance(prompts[0], str):
        completions = [[{"role": "assistant", "content": text}] for text in texts]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    extras = {"trainer_state": trainer.state, "log_extra": _ignore, "log_metric": _ignore}
    given = []
    for function in trainer.reward_funcs:
        values = function(prompts=prompts, completions=completions, completion_ids=ids, **columns, **extras)
        given.append([math.nan if value is None else float(value) for value in values])
    totals = []
    for values in zip(*given, strict=True):
        judged = [(w, v) for w, v in zip(trainer.reward_weights.tolist(), values, strict=True) if not math.isnan(v)]
        totals.append(sum(w * v for w, v in judged) if judged else math.nan)
    names = trainer.reward_func_names
    outcome = names.index(trainer.args.outcome_reward) if trainer.args.outcome_reward in names else 0
    return totals, given[outcome]


def _ignore(*_: Any) -> None:
    pass
