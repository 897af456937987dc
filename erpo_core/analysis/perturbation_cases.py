"""The answers that a perturbation disturbs: problems that the model solves, found by sampling, and their edits by arm.

The rows of a batch of attempts are stored behind the traces of its answers. A job that is tried again samples nothing
of such a batch: it takes the answers from their traces and draws the same edits, by one pass over each.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from erpo_core.analysis.checked import checked_rows, is_right
from erpo_core.analysis.edits import Edit, Vocabulary, choose_positions, draw_replacement, eligible_tokens
from erpo_core.analysis.scoring import Scored, best_tokens, prompt_id, score_answer, trace_of
from erpo_core.analysis.stored import stored_traces
from erpo_core.analysis.tokens import display_tokens
from erpo_core.data.formats import Problem
from erpo_core.errors import RunError, SpecError
from erpo_core.generation.base import Engine, Sample
from erpo_core.generation.seeds import mixed_seed
from erpo_core.job import JobInputs
from erpo_core.models import context_length
from erpo_core.prompts import prompt_ids, stop_token_ids
from erpo_core.records import Completions, Progress, Sink
from erpo_core.rewards.verify import Verifier
from erpo_core.specs.perturbation import ATTEMPTS_STEP, Arm, PerturbationSpec

_TRACE_ALTERNATIVES = 5


@dataclass(frozen=True)
class Variant:
    """A disturbed answer: its arm, its edits, and the tokens that the model goes on from."""

    arm: Arm
    edits: tuple[Edit, ...]
    prefix: list[int]

    def key(self, group: int) -> str:
        """Names the variant, edits included: a stored outcome of other edits is not mistaken for it."""
        if len(self.edits) == 1:
            edit = self.edits[0]
            new = "" if edit.replacement is None else edit.replacement
            return f"{group}/{self.arm}/{edit.position}/{edit.token_id}>{new}"
        text = json.dumps([(e.position, e.token_id, e.replacement) for e in self.edits])
        return f"{group}/{self.arm}/all/{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Tried:
    """A problem after its attempts; ``group`` is its place in the data set."""

    group: int
    problem: Problem
    prompt: list[int]
    num_right: int
    answer: list[int] | None
    """Token ids of the first right answer. None: there is none, or it is known to be too short to be disturbed."""


@dataclass(frozen=True)
class Case:
    """A problem that the model solves, with the variants of its answer, arm by arm, equally many in each."""

    group: int
    problem: Problem
    prompt: list[int]
    tokens: list[str]
    entropies: np.ndarray
    variants: dict[Arm, list[Variant]]


class CaseFinder:
    """Finds cases and stores the undisturbed answers. ``counts``: what became of the problems that were tried."""

    def __init__(
        self,
        spec: PerturbationSpec,
        model: Any,
        engine: Engine,
        info: dict[str, Any],
        verifier: Verifier,
        sink: Sink,
        inputs: JobInputs,
    ) -> None:
        self.spec, self.model, self.engine, self.tokenizer = spec, model, engine, engine.tokenizer
        self.info, self.verifier, self.sink = info, verifier, sink
        self.vocabulary = Vocabulary(self.tokenizer)
        self.counts = {"num_tried": 0, "num_solved": 0, "num_too_short": 0, "solve_rate": 0.0}
        self.traces = stored_traces(inputs)
        self.attempts = {(row["prompt_id"], row["sample"]): row for row in inputs.stored_rows}

    def find(self, problems: Sequence[Problem]) -> list[Case]:
        """Cases until there are enough.

        Raises:
            RunError: ``nothing_solved``: no answer can be disturbed.
            SpecError: two answers' lengths do not fit into the model's context.
        """
        cases: list[Case] = []
        right = 0
        size = max(1, self.spec.batch_size // self.spec.num_attempts)
        for start in range(0, len(problems), size):
            tried, fresh = self._try(problems[start : start + size], start)
            for one in tried:
                if len(cases) == self.spec.num_problems:
                    break
                right += one.num_right
                if (case := self._case_of(one)) is not None:
                    cases.append(case)
            if fresh:
                self.sink.emit(Completions(ATTEMPTS_STEP, fresh))
            self.sink.emit(Progress("solve", len(cases), self.spec.num_problems, dict(self.counts)))
            if len(cases) == self.spec.num_problems:
                break
        self.counts["solve_rate"] = right / (self.counts["num_tried"] * self.spec.num_attempts)
        if not cases:
            raise RunError(
                f"of {self.counts['num_tried']} problems {self.counts['num_solved']} were solved, and no answer has "
                "enough tokens before its box; try an easier data set, worked examples, or a smaller min_solved",
                code="nothing_solved",
            )
        return cases

    def _try(self, problems: Sequence[Problem], start: int) -> tuple[list[Tried], list[dict[str, Any]]]:
        """Some problems after their attempts, and the rows of these that are not stored yet."""
        prompts = [prompt_ids(self.tokenizer, problem.problem, self.spec.prompt) for problem in problems]
        numbers = range(self.spec.num_attempts)
        groups = range(start, start + len(problems))
        if all((str(group), number) in self.attempts for group in groups for number in numbers):
            rows = [[self.attempts[str(group), number] for number in numbers] for group in groups]
            traces = [self.traces.get((prompt_id(group), 0)) for group in groups]
            answers = [None if trace is None else trace.token_ids for trace in traces]
            return list(map(Tried, groups, problems, prompts, map(_num_right, rows), answers)), []
        self._check_room(max(map(len, prompts)))
        sampled = sample(self.spec, self.engine, prompts, self.spec.num_attempts, seed_of(self.spec, "attempt", start))
        rows = [
            checked_rows(
                self.verifier,
                self.tokenizer,
                [(one.token_ids, one.finished) for one in samples],
                prompt_id=str(group),
                group=group,
                prompt=problem.problem,
                gold=problem.answer,
            )
            for group, problem, samples in zip(groups, problems, sampled, strict=True)
        ]
        answers = [
            next((one.token_ids for one, row in zip(samples, found, strict=True) if is_right(row)), None)
            for samples, found in zip(sampled, rows, strict=True)
        ]
        tried = list(map(Tried, groups, problems, prompts, map(_num_right, rows), answers))
        return tried, [row for found in rows for row in found]

    def _check_room(self, prompt_tokens: int) -> None:
        room = context_length(self.model.config)
        length = self.spec.sampling.max_completion_length
        if room is not None and prompt_tokens + 2 * length > room:
            raise SpecError(
                f"a prompt of {prompt_tokens} tokens, an answer and its continuation of up to {length} tokens each do "
                f"not fit into the model's {room}",
                pointer="/sampling/max_completion_length",
                mend=f"write at most {max(1, (room - prompt_tokens) // 2)}",
            )

    def _case_of(self, tried: Tried) -> Case | None:
        """Counts a problem; its case, if it is solved and its answer long enough."""
        self.counts["num_tried"] += 1
        if tried.num_right < self.spec.min_solved * self.spec.num_attempts:
            return None
        self.counts["num_solved"] += 1
        case = None if tried.answer is None else self._case(tried, tried.answer)
        self.counts["num_too_short"] += case is None
        return case

    def _case(self, tried: Tried, token_ids: list[int]) -> Case | None:
        spec, group = self.spec, tried.group
        temperature = spec.temperature
        facts = {"prompt": tried.problem.problem, "group": group, "gold": tried.problem.answer}
        scored = score_answer(self.model, self.tokenizer, tried.prompt, token_ids, temperature=temperature, **facts)
        tokens = display_tokens(self.tokenizer, token_ids)
        eligible = eligible_tokens(tokens, scored.countable)
        positions = choose_positions(scored.columns["entropy"], eligible, spec, (spec.sampling.seed, group))
        if not all(positions.values()):
            return None
        edits = self._edits(group, scored, positions)
        stored = self.traces.get((prompt_id(group), 0))
        if stored is None or stored.token_ids != token_ids:
            pivots = np.array(sorted(set(positions.get("high", []))), dtype=np.int64)
            options = {"temperature": temperature, "top_k": _TRACE_ALTERNATIVES, "verifier": self.verifier}
            self.sink.emit(trace_of(self.model, self.tokenizer, scored, pivots, self.info, **options))
        last = int(np.flatnonzero(eligible)[-1]) + 1
        variants = {arm: _variants(spec, arm, token_ids, found, last) for arm, found in edits.items()}
        return Case(group, tried.problem, tried.prompt, tokens, scored.columns["entropy"], variants)

    def _edits(self, group: int, scored: Scored, positions: dict[Arm, list[int]]) -> dict[Arm, list[Edit]]:
        places = sorted({place for found in positions.values() for place in found})
        size = self.model.get_output_embeddings().weight.shape[0]
        ids, values = best_tokens(self.model, scored, np.array(places), size, temperature=self.spec.temperature)
        logps = {place: _by_id(*row) for place, *row in zip(places, ids, values, strict=True)}
        return {arm: [self._edit(arm, group, scored, p, logps[p]) for p in found] for arm, found in positions.items()}

    def _edit(self, arm: Arm, group: int, scored: Scored, position: int, logps: np.ndarray) -> Edit:
        written = scored.token_ids[position]
        if arm == "same":
            return Edit(position, written, written, float(logps[written]))
        if self.spec.policy == "truncate":
            return Edit(position, written, None, None)
        rng = np.random.default_rng((self.spec.sampling.seed, group, position))
        allowed = self.vocabulary.allowed(written, len(logps))
        replacement = draw_replacement(self.spec.policy, logps, allowed, rng, self.spec.surprisal_band)
        return Edit(position, written, replacement, float(logps[replacement]))


def sample(
    spec: PerturbationSpec, engine: Engine, prompts: Sequence[list[int]], count: int, seed: int
) -> list[list[Sample]]:
    """``count`` answers to each prompt, drawn as the specification says."""
    sampling = spec.sampling
    return engine.generate(
        prompts,
        n=count,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_new_tokens=sampling.max_completion_length,
        stop_ids=stop_token_ids(engine.tokenizer, engine.model),
        seed=seed,
    )


def seed_of(spec: PerturbationSpec, *parts: Any) -> int:
    """The same for all arms: what they do not share is what was disturbed."""
    return mixed_seed(spec.sampling.seed, *parts)


def _num_right(rows: Sequence[dict[str, Any]]) -> int:
    return sum(map(is_right, rows))


def _variants(spec: PerturbationSpec, arm: Arm, token_ids: list[int], edits: list[Edit], last: int) -> list[Variant]:
    """``last``: one after the last token that may be disturbed; in ``edit_all`` the model goes on from there."""
    if spec.mode == "branch_one":
        return [Variant(arm, (e,), token_ids[: e.position] + _tokens_of(e)) for e in edits]
    edited = list(token_ids[:last])
    for edit in edits:
        edited[edit.position] = edit.replacement
    return [Variant(arm, tuple(edits), edited)]


def _tokens_of(edit: Edit) -> list[int]:
    return [] if edit.replacement is None else [edit.replacement]


def _by_id(ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    found = np.empty(len(values), dtype=np.float64)
    found[ids] = values
    return found
