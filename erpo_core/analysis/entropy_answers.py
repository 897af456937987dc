"""What an entropy analysis scores: texts of the request, stored answers of a run, or answers sampled to problems."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from erpo_core.analysis.scoring import prompt_id
from erpo_core.analysis.stored import StoredTrace
from erpo_core.data.datasets import load_problems
from erpo_core.errors import SpecError
from erpo_core.generation.base import Engine
from erpo_core.job import JobInputs
from erpo_core.prompts import prompt_ids
from erpo_core.records import Progress, Sink
from erpo_core.specs.common import PromptSpec
from erpo_core.specs.entropy import EntropySpec


@dataclass(frozen=True)
class Answer:
    """What is scored. ``pointer``: where the specification holds its text."""

    problem: str
    group: int
    sample: int
    prompt_tokens: list[int]
    token_ids: list[int]
    pointer: str = ""
    gold: str | None = None

    @property
    def key(self) -> tuple[str, int]:
        """Names the answer in stored records."""
        return prompt_id(self.group), self.sample


def given_answers(spec: EntropySpec, inputs: JobInputs, tokenizer) -> list[Answer]:
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


@dataclass(frozen=True)
class Problem:
    """What answers are sampled to, with its prompt's token ids."""

    text: str
    gold: str | None
    ids: list[int]


def problems_of(spec: EntropySpec, inputs: JobInputs, tokenizer) -> list[Problem]:
    """The prompts of the request, or the first problems of a data set; none where it brings answers."""
    found: Sequence[tuple[str, str | None]] = [(problem, None) for problem in spec.prompts]
    if spec.dataset:
        roots = {"data_root": inputs.data_root, "cache_dir": inputs.cache_dir}
        found = [(row.problem, row.answer) for row in load_problems(spec.dataset, limit=spec.limit, **roots)]
    return [Problem(text, gold, prompt_ids(tokenizer, text, spec.prompt)) for text, gold in found]


def sampled_answers(
    spec: EntropySpec,
    problems: Sequence[Problem],
    engine: Engine,
    stop_ids: list[int],
    stored: Mapping[tuple[str, int], StoredTrace],
    sink: Sink,
) -> Iterator[Answer]:
    """``num_samples`` answers to each problem.

    A batch is sampled when its first answer is wanted, and not at all where every answer of it is stored.
    """
    sampling, count = spec.sampling, spec.num_samples
    size = max(1, spec.batch_size // count)
    for start in range(0, len(problems), size):
        batch = problems[start : start + size]
        answers = [
            Answer(problem.text, group, number, problem.ids, [], gold=problem.gold)
            for group, problem in enumerate(batch, start)
            for number in range(count)
        ]
        fresh: list[list[int]] = []
        if not all(answer.key in stored for answer in answers):
            sink.emit(Progress("generate", start * count, len(problems) * count))
            groups = engine.generate(
                [problem.ids for problem in batch],
                n=count,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_new_tokens=sampling.max_completion_length,
                stop_ids=stop_ids,
                seed=sampling.seed + start,
            )
            fresh = [sample.token_ids for samples in groups for sample in samples]
        for index, answer in enumerate(answers):
            known = stored.get(answer.key)
            yield replace(answer, token_ids=fresh[index] if known is None else known.token_ids)


def check_given(answers: Sequence[Answer], tokenizer, room: int | None) -> None:
    """Every text must fit into the model's ``room`` tokens (None: no limit) and into the template's one turn.

    Raises:
        SpecError: with the place of the text.
    """
    special = set(tokenizer.all_special_ids)
    for answer in answers:
        if not answer.token_ids:
            raise SpecError("an empty response", pointer=answer.pointer, mend="give some text")
        length = len(answer.prompt_tokens) + len(answer.token_ids)
        if room is not None and length > room:
            raise SpecError(
                f"prompt and answer have {length} tokens, the model's context holds {room}",
                pointer=answer.pointer,
                mend="shorten the text",
            )
        if found := special & set(answer.token_ids[:-1]):
            marks = tokenizer.decode(sorted(found))
            raise SpecError(
                f"the response holds {marks!r} before its end: it does not follow the template",
                pointer=answer.pointer,
                mend="give the answer alone; the template puts the turns around it",
            )


def check_room(spec: EntropySpec, problems: Sequence[Problem], room: int | None) -> None:
    """Every prompt must leave room for an answer of the length that may be sampled.

    Raises:
        SpecError: naming the length.
    """
    length = spec.sampling.max_completion_length
    longest = max(len(problem.ids) for problem in problems)
    if room is not None and longest + length > room:
        raise SpecError(
            f"a prompt of {longest} tokens and an answer of up to {length} do not fit into the model's {room}",
            pointer="/sampling/max_completion_length",
            mend=f"write at most {max(1, room - longest)}",
        )
