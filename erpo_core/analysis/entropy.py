"""One entropy analysis: answers given or sampled, scored by one teacher-forced pass, stored with their pivots.

Answers are stored as they are scored, and an attempt goes on from what earlier ones have stored: a batch is sampled
with the seed of its place, and only if an answer of it is missing; what is stored is not scored again.
"""

import time
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from erpo_core.analysis.detectors import DETECTOR_VERSION, find_pivots
from erpo_core.analysis.entropy_answers import (
    Answer,
    check_given,
    check_room,
    given_answers,
    problems_of,
    sampled_answers,
)
from erpo_core.analysis.scoring import Scored, countable_tokens, score_answer, trace_of
from erpo_core.analysis.statistics import sequence_stats, top_pivot_tokens
from erpo_core.analysis.stored import StoredTrace, stored_traces
from erpo_core.data.formats import problems_digest
from erpo_core.generation.base import watch_and_leave
from erpo_core.generation.transformers import TransformersEngine
from erpo_core.job import JobInputs, Stop, leave_if_asked, leaves_early
from erpo_core.memory import SMALL_MODEL, count_parameters
from erpo_core.models import context_length, load_policy, prepare_model
from erpo_core.prompts import stop_token_ids
from erpo_core.records import Progress, Result, Sink
from erpo_core.resolved import report_resolved
from erpo_core.rewards.verify import Verifier
from erpo_core.specs.entropy import EntropySpec


@leaves_early
def run_entropy(spec: EntropySpec, inputs: JobInputs, sink: Sink, stop: Stop) -> dict[str, Any]:
    """Analyse and report. Returns the summary; ``{"stopped": True}`` where ``stop`` ended it early.

    ``inputs.source``, where the specification names a run, is ``{"prompt_spec", "answers"}``; of each answer
    ``{"prompt", "completion", "gold"}``.

    Raises:
        SpecError: a text is empty, or longer than the model's context, or holds turns of a chat; or a prompt leaves no
            room for a sampled answer. Nothing is scored then.
    """
    started = time.monotonic()
    sink.emit(Progress("load", 0, 1))
    path = prepare_model(inputs.model.base, cache_dir=inputs.cache_dir, model_roots=inputs.model_roots)
    # Of what bfloat16 costs, up to a tenth of a nat, the head is spared; a small model is spared all of it.
    small = count_parameters(path) <= SMALL_MODEL
    model, tokenizer, info = load_policy(inputs, dtype=torch.float32 if small else None)
    model.eval()
    stored = stored_traces(inputs)
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    problems = problems_of(spec, inputs, tokenizer)
    resolved = {"model": info, "prompts_digest": problems_digest(problems), "versions": versions}
    report_resolved(sink, inputs, resolved | {"stored_answers": len(stored)})
    room = context_length(model.config)
    if problems:
        check_room(spec, problems, room)
        total = len(problems) * spec.num_samples
        engine, stop_ids = TransformersEngine(model, tokenizer), stop_token_ids(tokenizer, model)
        engine.watch = watch_and_leave(stop)
        answers = sampled_answers(spec, problems, engine, stop_ids, stored, sink)
    else:
        answers = given_answers(spec, inputs, tokenizer)
        total = len(answers)
        check_given(answers, tokenizer, room)
    with Verifier() as verifier:
        summary = _Analysis(spec, model, tokenizer, info, stored, verifier, sink).run(answers, total, stop)
    summary |= {"seconds": time.monotonic() - started}
    sink.emit(Result(summary))
    return summary


class _Analysis:
    def __init__(
        self, spec: EntropySpec, model, tokenizer, info: dict[str, Any], stored, verifier: Verifier, sink: Sink
    ) -> None:
        self.spec, self.model, self.tokenizer, self.info, self.sink = spec, model, tokenizer, info, sink
        self.verifier = verifier
        self.stored: dict[tuple[str, int], StoredTrace] = stored
        self.answers: list[Answer] = []
        self.entropies: list[np.ndarray] = []
        self.pivots: list[list[dict[str, Any]]] = []

    def run(self, answers: Iterable[Answer], total: int, stop: Stop) -> dict[str, Any]:
        """The summary. Hidden states of one answer at a time are alive.

        Where pivots depend on other answers, answers are stored without any at first; those in which some are found at
        the end are scored a second time, for their alternatives.
        """
        for answer in answers:
            leave_if_asked(stop)
            self._add(answer)
            self.sink.emit(Progress("score", len(self.answers), total))
        self._find_pivots_over_all(stop)
        return self._summary()

    def _add(self, answer: Answer) -> None:
        stored = self.stored.get(answer.key)
        if stored is not None and stored.token_ids == answer.token_ids:
            self._keep(answer, stored.entropies)
            self.pivots.append(stored.pivots)
            return
        scored = self._score(answer)
        self._keep(answer, scored.columns["entropy"])
        positions = np.array([], dtype=np.int64)
        if self.spec.detector.scope == "sequence":
            positions = find_pivots(self.entropies[-1:], self.spec.detector, seed=len(self.answers) - 1)[0]
        self.pivots.append(self._store(scored, positions))

    def _keep(self, answer: Answer, entropies: np.ndarray) -> None:
        self.answers.append(answer)
        self.entropies.append(np.where(countable_tokens(self.tokenizer, answer.token_ids), entropies, np.nan))

    def _find_pivots_over_all(self, stop: Stop) -> None:
        """For detectors of a group or of the whole run."""
        if self.spec.detector.scope == "sequence":
            return
        found = find_pivots(self.entropies, self.spec.detector, [answer.group for answer in self.answers])
        for index, positions in enumerate(found):
            if [pivot["position"] for pivot in self.pivots[index]] != positions.tolist():
                leave_if_asked(stop)
                self.pivots[index] = self._store(self._score(self.answers[index]), positions)
            self.sink.emit(Progress("pivots", index + 1, len(found)))

    def _score(self, answer: Answer) -> Scored:
        return score_answer(
            self.model,
            self.tokenizer,
            answer.prompt_tokens,
            answer.token_ids,
            temperature=self.spec.temperature,
            reference=self.spec.reference,
            prompt=answer.problem,
            group=answer.group,
            sample=answer.sample,
            gold=answer.gold,
        )

    def _store(self, scored: Scored, positions: np.ndarray) -> list[dict[str, Any]]:
        trace = trace_of(
            self.model,
            self.tokenizer,
            scored,
            positions,
            self.info,
            temperature=self.spec.temperature,
            top_k=self.spec.top_k_alternatives,
            verifier=self.verifier,
        )
        self.sink.emit(trace)
        return trace.meta["pivots"]

    def _summary(self) -> dict[str, Any]:
        joined = np.concatenate(self.entropies) if self.entropies else np.array([])
        counted = joined[~np.isnan(joined)]
        stats, _ = sequence_stats(counted)
        pivots = [pivot for found in self.pivots for pivot in found]
        return {
            "exact": True,
            "num_sequences": len(self.entropies),
            "num_tokens": len(counted),
            "entropy": {name.removeprefix("h_"): value for name, value in stats.items()},
            "num_pivots": len(pivots),
            "top_pivot_tokens": top_pivot_tokens(pivots),
            "detector_version": DETECTOR_VERSION,
        }
