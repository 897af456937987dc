"""Disturb right answers at tokens of high and of low entropy, let the model go on, and see whether it still gets there.

The experiment behind Fig. 1b of arXiv 2603.28204 with the controls that it needs: problems are found by sampling, every
arm disturbs the same answers at equally many tokens, continuations of one batch layout use the same random numbers in
every arm, and what is compared are problems, not continuations.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from erpo_core.analysis.edits import Edit, Vocabulary, choose_positions, draw_replacement, eligible_tokens
from erpo_core.analysis.perturbation_summary import summarise
from erpo_core.analysis.scoring import Scored, best_tokens, score_answer, trace_of
from erpo_core.analysis.tokens import display_tokens
from erpo_core.data.datasets import load_problems
from erpo_core.data.formats import Problem, problems_digest
from erpo_core.errors import RunError, SpecError
from erpo_core.generation.transformers import TransformersEngine
from erpo_core.job import JobInputs, Stop
from erpo_core.models import load_policy
from erpo_core.prompts import prompt_ids, stop_token_ids, template_digest
from erpo_core.records import Completions, Progress, Resolved, Result, Sink
from erpo_core.rewards.answers import has_answer
from erpo_core.rewards.verify import Verdict, Verifier
from erpo_core.specs.perturbation import Arm, PerturbationSpec

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
class Case:
    """A problem that the model solves, with the variants of its answer, arm by arm, equally many in each."""

    group: int
    problem: Problem
    prompt: list[int]
    tokens: list[str]
    entropies: np.ndarray
    variants: dict[Arm, list[Variant]]


def run_perturbation(spec: PerturbationSpec, inputs: JobInputs, sink: Sink, stop: Stop) -> dict[str, Any]:
    """Run the experiment; emits Resolved, Progress, Trace (the undisturbed answers), Completions and Result.

    Returns:
        The summary, or ``{"stopped": True}``: what is stored is used again by the next attempt.

    Raises:
        RunError: ``nothing_solved``: no answer could be disturbed; or the model or the data set cannot be had.
        SpecError: two answers' lengths do not fit into the model's context.
    """
    import torch

    sink.emit(Progress("load", 0, 1))
    problems = load_problems(spec.dataset, data_root=inputs.data_root, cache_dir=inputs.cache_dir, limit=spec.limit)
    dtype = None if spec.bf16 is None else torch.bfloat16 if spec.bf16 else torch.float32
    model, tokenizer, info = load_policy(inputs, dtype=dtype)
    if inputs.model.adapter_path is not None and info["dtype"] == "float32":
        model = model.merge_and_unload()
    model.eval()
    resolved = {
        **info,
        "dataset_digest": problems_digest(problems),
        "num_problems": len(problems),
        "template_digest": template_digest(tokenizer, spec.prompt),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    sink.emit(Resolved(resolved))
    with Verifier() as verifier:
        study = _Study(spec, model, tokenizer, info, verifier, sink)
        cases = study.find_cases(problems, stop)
        rows = None if cases is None else study.continue_all(cases, inputs.stored_rows, stop)
    if rows is None:
        return {"stopped": True}
    facts = [_facts(case, arm, study.vocabulary.texts) for case in cases for arm in spec.arms]
    summary = summarise(rows, facts, spec) | study.counts
    sink.emit(Result(summary))
    return summary


class _Study:
    def __init__(self, spec: PerturbationSpec, model: Any, tokenizer: Any, info: dict, verifier: Verifier, sink: Sink):
        self.spec, self.model, self.tokenizer, self.info = spec, model, tokenizer, info
        self.verifier, self.sink = verifier, sink
        self.engine = TransformersEngine(model, tokenizer)
        self.stop_ids = stop_token_ids(tokenizer)
        self.vocabulary = Vocabulary(tokenizer)
        self.counts = {"num_tried": 0, "num_solved": 0, "num_too_short": 0, "solve_rate": 0.0}

    def find_cases(self, problems: Sequence[Problem], stop: Stop) -> list[Case] | None:
        """Solved problems until there are enough; None if asked to leave."""
        cases: list[Case] = []
        right = 0
        size = max(1, self.spec.batch_size // self.spec.num_attempts)
        for start in range(0, len(problems), size):
            if stop.requested:
                return None
            for group, problem, prompt, answers in self._attempt(problems, start, start + size):
                if len(cases) == self.spec.num_problems:
                    break
                self.counts["num_tried"] += 1
                solved = [token_ids for token_ids, is_right in answers if is_right]
                right += len(solved)
                if len(solved) < self.spec.min_solved * len(answers):
                    continue
                self.counts["num_solved"] += 1
                case = self._case(group, problem, prompt, solved[0])
                if case is None:
                    self.counts["num_too_short"] += 1
                else:
                    cases.append(case)
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

    def _attempt(self, problems: Sequence[Problem], start: int, end: int) -> Iterator[tuple]:
        """(place in the data set, problem, prompt ids, [(answer's ids, is it right)]) of some problems."""
        some = problems[start:end]
        prompts = [prompt_ids(self.tokenizer, problem.problem, self.spec.prompt) for problem in some]
        self._check_room(max(map(len, prompts)))
        groups = self._generate(prompts, self.spec.num_attempts, _seed(self.spec, "attempt", start))
        for index, (problem, prompt, samples) in enumerate(zip(some, prompts, groups, strict=True)):
            verdicts = self._verdicts(problem, [sample.token_ids for sample in samples])
            answers = [
                (sample.token_ids, sample.finished and verdict is Verdict.RIGHT)
                for sample, verdict in zip(samples, verdicts, strict=True)
            ]
            yield start + index, problem, prompt, answers

    def _check_room(self, prompt_tokens: int) -> None:
        room = getattr(self.model.config, "max_position_embeddings", None)
        length = self.spec.sampling.max_completion_length
        if room is not None and prompt_tokens + 2 * length > room:
            raise SpecError(
                f"a prompt of {prompt_tokens} tokens, an answer and its continuation of up to {length} tokens each do "
                f"not fit into the model's {room}",
                pointer="/sampling/max_completion_length",
                mend=f"write at most {max(1, (room - prompt_tokens) // 2)}",
            )

    def _case(self, group: int, problem: Problem, prompt: list[int], token_ids: list[int]) -> Case | None:
        spec = self.spec
        temperature = spec.temperature
        facts = {"prompt": problem.problem, "group": group, "gold": problem.answer}
        scored = score_answer(self.model, self.tokenizer, prompt, token_ids, temperature=temperature, **facts)
        tokens = display_tokens(self.tokenizer, token_ids)
        eligible = eligible_tokens(tokens, scored.countable)
        positions = choose_positions(scored.columns["entropy"], eligible, spec, (spec.sampling.seed, group))
        if not all(positions.values()):
            return None
        edits = self._edits(group, scored, positions)
        pivots = np.array(sorted(set(positions.get("high", []))), dtype=np.int64)
        options = {"temperature": temperature, "top_k": _TRACE_ALTERNATIVES}
        self.sink.emit(trace_of(self.model, self.tokenizer, scored, pivots, self.info, **options))
        last = int(np.flatnonzero(eligible)[-1]) + 1
        variants = {arm: _variants(spec, arm, token_ids, found, last) for arm, found in edits.items()}
        return Case(group, problem, prompt, tokens, scored.columns["entropy"], variants)

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

    def continue_all(
        self, cases: Sequence[Case], stored_rows: Sequence[dict[str, Any]], stop: Stop
    ) -> list[dict[str, Any]] | None:
        """An outcome for every continuation of every variant, stored ones taken as they are; None if asked to leave."""
        stored = {(row["prompt_id"], row["sample"]): row for row in stored_rows}
        rows: list[dict[str, Any]] = []
        num_variants = {len(variants) for case in cases for variants in case.variants.values()}
        size = max(1, self.spec.batch_size // (max(num_variants) * self.spec.num_continuations))
        total = sum(len(v) for case in cases for v in case.variants.values()) * self.spec.num_continuations
        for start in range(0, len(cases), size):
            for arm in self.spec.arms:
                batch = [(case, variant) for case in cases[start : start + size] for variant in case.variants[arm]]
                keys = [(v.key(c.group), k) for c, v in batch for k in range(self.spec.num_continuations)]
                if not all(key in stored for key in keys):
                    if stop.requested:
                        return None
                    fresh = self._continue(batch, _seed(self.spec, "continue", start))
                    self.sink.emit(Completions(0, [r for r in fresh if (r["prompt_id"], r["sample"]) not in stored]))
                    stored = {(r["prompt_id"], r["sample"]): r for r in fresh} | stored
                rows += [stored[key] for key in keys]
                self.sink.emit(Progress("continue", len(rows), total))
        return rows

    def _continue(self, batch: Sequence[tuple[Case, Variant]], seed: int) -> list[dict[str, Any]]:
        prompts = [case.prompt + variant.prefix for case, variant in batch]
        groups = self._generate(prompts, self.spec.num_continuations, seed)
        rows = []
        for (case, variant), samples in zip(batch, groups, strict=True):
            answers = [variant.prefix + sample.token_ids for sample in samples]
            verdicts = self._verdicts(case.problem, answers)
            for number, (sample, answer, verdict) in enumerate(zip(samples, answers, verdicts, strict=True)):
                text = self._text(answer)
                right = float(verdict is Verdict.RIGHT and sample.finished)
                rows.append(
                    {
                        "prompt_id": variant.key(case.group),
                        "group": case.group,
                        "sample": number,
                        "prompt": case.problem.problem,
                        "completion": text,
                        "gold": case.problem.answer,
                        "rewards": {"accuracy": right},
                        "reward": right,
                        "advantage": None,
                        "verdict": str(verdict),
                        "boxed": has_answer(text),
                        "truncated": not sample.finished,
                        "num_tokens": len(answer),
                    }
                )
        return rows

    def _generate(self, prompts: list[list[int]], n: int, seed: int) -> list:
        sampling = self.spec.sampling
        return self.engine.generate(
            prompts,
            n=n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_new_tokens=sampling.max_completion_length,
            stop_ids=self.stop_ids,
            seed=seed,
        )

    def _verdicts(self, problem: Problem, answers: Sequence[list[int]]) -> list[Verdict]:
        return self.verifier.check_many([(problem.answer, self._text(answer)) for answer in answers])

    def _text(self, token_ids: Sequence[int]) -> str:
        # PostgreSQL's text holds no NUL character.
        return self.tokenizer.decode(token_ids, skip_special_tokens=True).replace("\0", "\ufffd")


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


def _facts(case: Case, arm: Arm, texts: Sequence[str]) -> dict[str, Any]:
    """What a summary and its readers want to know of an arm's edits of one answer."""
    edits = [edit for variant in case.variants[arm] for edit in variant.edits]
    return {
        "group": case.group,
        "arm": arm,
        "edits": [
            {
                "position": edit.position,
                "progress": edit.position / len(case.tokens),
                "entropy": float(case.entropies[edit.position]),
                "token": case.tokens[edit.position],
                "replacement": None if edit.replacement is None else texts[edit.replacement],
                "surprisal": None if edit.logp is None else -edit.logp,
            }
            for edit in edits
        ],
    }


def _by_id(ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    found = np.empty(len(values), dtype=np.float64)
    found[ids] = values
    return found


def _seed(spec: PerturbationSpec, *parts: Any) -> int:
    """The same for all arms: what they do not share is what was disturbed."""
    return int.from_bytes(hashlib.sha256(json.dumps([spec.sampling.seed, *parts]).encode()).digest()[:7])
