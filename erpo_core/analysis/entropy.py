"""One entropy analysis: answers given or sampled, scored by one teacher-forced pass, stored with their pivots."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from erpo_core.analysis.detectors import DETECTOR_VERSION, find_pivots
from erpo_core.analysis.scoring import Scored, score_answer, trace_of
from erpo_core.analysis.statistics import sequence_stats
from erpo_core.data.datasets import load_problems
from erpo_core.errors import SpecError
from erpo_core.generation.transformers import TransformersEngine
from erpo_core.job import JobInputs, Stop
from erpo_core.models import load_policy
from erpo_core.prompts import prompt_ids, stop_token_ids
from erpo_core.records import Progress, Resolved, Result, Sink
from erpo_core.specs.common import PromptSpec
from erpo_core.specs.entropy import EntropySpec

_TOP_TOKENS = 20


@dataclass(frozen=True)
class Answer:
    """What is scored. ``pointer``: where the specification names it."""

    problem: str
    group: int
    sample: int
    prompt_tokens: list[int]
    token_ids: list[int]
    pointer: str
    gold: str | None = None


def run_entropy(spec: EntropySpec, inputs: JobInputs, sink: Sink, stop: Stop) -> dict[str, Any]:
    """Analyse and report. Returns the summary; ``{"stopped": True}`` where ``stop`` ended it early.

    ``inputs.source``, where the specification names a run, is ``{"prompt_spec", "answers"}``; of each answer
    ``{"prompt", "completion", "gold"}``.

    Raises:
        SpecError: a text is empty, longer than the model's context, or holds turns of a chat. Nothing is scored then.
    """
    started = time.monotonic()
    sink.emit(Progress("load", 0, 1))
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model, tokenizer, info = load_policy(inputs, dtype=dtype)
    model.eval()
    sink.emit(Resolved({"model": info, "versions": {n: version(n) for n in ("torch", "transformers", "peft")}}))
    answers = _given(spec, inputs, tokenizer) or _sampled(spec, inputs, model, tokenizer, sink)
    for answer in answers:
        _check(answer, tokenizer, getattr(model.config, "max_position_embeddings", None))
    summary = _Analysis(spec, model, tokenizer, info, sink).run(answers, stop)
    if summary is None:
        return {"stopped": True}
    summary |= {"seconds": time.monotonic() - started}
    sink.emit(Result(summary))
    return summary


class _Analysis:
    def __init__(self, spec: EntropySpec, model, tokenizer, info: dict[str, Any], sink: Sink) -> None:
        self.spec, self.model, self.tokenizer, self.info, self.sink = spec, model, tokenizer, info, sink
        self.entropies: list[np.ndarray] = []
        self.pivots: dict[str, list[float]] = {}

    def run(self, answers: Sequence[Answer], stop: Stop) -> dict[str, Any] | None:
        """The summary; None if asked to leave. Hidden states of one answer at a time are alive.

        Where pivots depend on other answers, each is scored a second time once they are known.
        """
        by_itself = self.spec.detector.scope == "sequence"
        for done, answer in enumerate(answers):
            if stop.requested:
                return None
            scored = self._score(answer)
            self.entropies.append(np.where(scored.countable, scored.columns["entropy"], np.nan))
            if by_itself:
                self._store(scored, find_pivots(self.entropies[-1:], self.spec.detector, seed=done)[0])
            self.sink.emit(Progress("score", done + 1, len(answers)))
        if not by_itself:
            pivots = find_pivots(self.entropies, self.spec.detector, [answer.group for answer in answers])
            for answer, positions in zip(answers, pivots, strict=True):
                if stop.requested:
                    return None
                self._store(self._score(answer), positions)
        return self._summary()

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

    def _store(self, scored: Scored, positions: np.ndarray) -> None:
        options = {"temperature": self.spec.temperature, "top_k": self.spec.top_k_alternatives}
        trace = trace_of(self.model, self.tokenizer, scored, positions, self.info, **options)
        for pivot in trace.meta["pivots"]:
            self.pivots.setdefault(pivot["token"], []).append(pivot["entropy"])
        self.sink.emit(trace)

    def _summary(self) -> dict[str, Any]:
        joined = np.concatenate(self.entropies) if self.entropies else np.array([])
        counted = joined[~np.isnan(joined)]
        stats, _ = sequence_stats(counted)
        ranked = sorted(self.pivots.items(), key=lambda item: (-len(item[1]), -max(item[1])))[:_TOP_TOKENS]
        return {
            "num_sequences": len(self.entropies),
            "num_tokens": len(counted),
            "entropy": {name.removeprefix("h_"): value for name, value in stats.items()},
            "num_pivots": sum(map(len, self.pivots.values())),
            "top_pivot_tokens": [{"token": token, "count": len(h), "max_entropy": max(h)} for token, h in ranked],
            "detector_version": DETECTOR_VERSION,
        }


def _given(spec: EntropySpec, inputs: JobInputs, tokenizer) -> list[Answer]:
    """Answers that need no sampling: texts of the request, or stored ones of a run."""
    if spec.source:
        prompt_spec = PromptSpec.model_validate(inputs.source["prompt_spec"])
        pairs = [(row["prompt"], row["completion"], row["gold"]) for row in inputs.source["answers"]]
    else:
        prompt_spec, pairs = spec.prompt, [(pair.prompt, pair.response, None) for pair in spec.texts]
    pointer = "/source" if spec.source else "/texts/{}/response"
    groups: dict[str, int] = {}
    samples: dict[int, int] = {}
    answers = []
    for index, (problem, text, gold) in enumerate(pairs):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if spec.source and not ids:
            continue  # A sampled answer may be nothing but its end.
        group = groups.setdefault(problem, len(groups)) if spec.source else index
        samples[group] = samples.get(group, -1) + 1
        prompt = prompt_ids(tokenizer, problem, prompt_spec)
        answers.append(Answer(problem, group, samples[group], prompt, ids, pointer.format(index), gold))
    return answers


def _sampled(spec: EntropySpec, inputs: JobInputs, model, tokenizer, sink: Sink) -> list[Answer]:
    problems: Sequence[tuple[str, str | None]] = [(problem, None) for problem in spec.prompts]
    if spec.dataset:
        roots = {"data_root": inputs.data_root, "cache_dir": inputs.cache_dir}
        found = load_problems(spec.dataset, limit=spec.limit, **roots)
        problems = [(problem.problem, problem.answer) for problem in found]
    prompts = [prompt_ids(tokenizer, problem, spec.prompt) for problem, _ in problems]
    engine, sampling, answers = TransformersEngine(model, tokenizer), spec.sampling, []
    size = max(1, spec.batch_size // spec.num_samples)
    for start in range(0, len(prompts), size):
        groups = engine.generate(
            prompts[start : start + size],
            n=spec.num_samples,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_new_tokens=sampling.max_completion_length,
            stop_ids=stop_token_ids(tokenizer),
            seed=sampling.seed + start,
        )
        for group, samples in enumerate(groups, start):
            pointer = "/dataset" if spec.dataset else f"/prompts/{group}"
            problem, gold = problems[group]
            answers += [
                Answer(problem, group, number, prompts[group], sample.token_ids, pointer, gold)
                for number, sample in enumerate(samples)
            ]
        sink.emit(Progress("generate", min(start + size, len(prompts)), len(prompts)))
    return answers


def _check(answer: Answer, tokenizer, limit: int | None) -> None:
    if not answer.token_ids:
        raise SpecError("an empty response", pointer=answer.pointer, mend="give some text")
    length = len(answer.prompt_tokens) + len(answer.token_ids)
    if limit is not None and length > limit:
        raise SpecError(
            f"prompt and answer have {length} tokens, the model's context holds {limit}",
            pointer=answer.pointer,
            mend="shorten the text",
        )
    special = set(tokenizer.all_special_ids) & set(answer.token_ids[:-1])
    if special:
        raise SpecError(
            f"the response holds {tokenizer.decode(sorted(special))!r} before its end: it does not follow the template",
            pointer=answer.pointer,
            mend="give the answer alone; the template puts the turns around it",
        )
