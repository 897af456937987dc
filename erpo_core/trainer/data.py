"""The rows that a training reads: prompts to answer, or solved problems to imitate."""

from typing import Any

from erpo_core.data.datasets import load_problems, solved
from erpo_core.data.formats import BoxReport, Problem
from erpo_core.errors import DatasetError
from erpo_core.job import JobInputs
from erpo_core.prompts import end_token_id, prompt_ids, prompt_messages, prompt_text
from erpo_core.records import Event, Sink
from erpo_core.rewards.answers import has_answer
from erpo_core.specs.train import BaseTrainSpec, GrpoTrainSpec, SftTrainSpec

_NAMED_ROWS = 20


def load_training_problems(spec: BaseTrainSpec, inputs: JobInputs, sink: Sink) -> list[Problem]:
    """The problems of a specification; golds that had to be read from odd solutions are reported."""
    boxes = BoxReport()
    problems = load_problems(spec.dataset, data_root=inputs.data_root, cache_dir=inputs.cache_dir, boxes=boxes)
    if boxes.none or boxes.empty or boxes.several:
        message = (
            f"golds read from solutions: {len(boxes.none)} rows have no box and {len(boxes.empty)} an empty one: they "
            f"are left out; {len(boxes.several)} have several different boxes, of which the last counts"
        )
        data = {name: ids[:_NAMED_ROWS] for name, ids in vars(boxes).items()}
        sink.emit(Event("dataset.boxes", message, "warn", data))
    return problems


def report_dropped(sink: Sink, dropped: int, total: int, why: str) -> None:
    """An event, if anything was left out."""
    if dropped:
        message = f"{dropped} of {total} problems {why} and are left out"
        sink.emit(Event("dataset.dropped", message, "warn", {"dropped": dropped, "total": total}))


def make_dataset(tokenizer, problems: list[Problem], spec: GrpoTrainSpec):
    """Rows of ``prompt`` (chat turns, or text), ``prompt_ids`` (what the model reads: as in an evaluation), ``answer``,
    ``problem``, ``prompt_id``; and how many were too long.

    Raises:
        DatasetError: none is short enough.
    """
    from datasets import Dataset

    room = spec.prompt_room
    chat = spec.prompt.template != "raw" and tokenizer.chat_template is not None
    rows = []
    for problem in problems:
        ids = prompt_ids(tokenizer, problem.problem, spec.prompt)
        if len(ids) > room:
            continue
        render = prompt_messages(problem.problem, spec.prompt) if chat else None
        prompt = render or prompt_text(tokenizer, problem.problem, spec.prompt)
        row = {"prompt": prompt, "prompt_ids": ids, "answer": problem.answer, "problem": problem.problem}
        rows.append(row | {"prompt_id": str(problem.id)})
    if not rows:
        raise DatasetError(
            f"every prompt is longer than {room} tokens", mend="raise max_length or lower max_completion_length"
        )
    groups = spec.generation_batch_size // spec.num_generations
    if len(rows) < groups:
        raise DatasetError(
            f"a step needs {groups} problems and the data set has {len(rows)}",
            mend="lower generation_batch_size or give more problems",
        )
    return Dataset.from_list(rows), len(problems) - len(rows)


def with_completion_length(spec: GrpoTrainSpec, dataset) -> GrpoTrainSpec:
    """The specification with its ``max_completion_length``: by default what ``max_length`` leaves beside the longest
    prompt (erpo-spec section 8)."""
    if spec.max_completion_length is not None:
        return spec
    longest = max(map(len, dataset["prompt_ids"]))
    return spec.model_copy(update={"max_completion_length": spec.max_length - longest})


def make_solution_dataset(tokenizer, problems: list[Problem], spec: SftTrainSpec, stop_ids: list[int]):
    """Rows of ``input_ids`` (the prompt as an evaluation has it, the solution, the end of the turn) and ``labels``
    (-100 in the prompt); and how many of the solved problems were too long.

    ``stop_ids``: tokens that end the model's answers.

    Raises:
        DatasetError: none is solved, or none is short enough.
    """
    from datasets import Dataset

    problems = solved(problems, spec.dataset)
    end = end_token_id(tokenizer, spec.prompt, stop_ids)
    rows: list[dict[str, Any]] = []
    for problem in problems:
        prompt = prompt_ids(tokenizer, problem.problem, spec.prompt)
        solution = tokenizer(boxed_solution(problem), add_special_tokens=False)["input_ids"]
        if len(prompt) + len(solution) + 1 <= spec.max_length:
            labels = [*[-100] * len(prompt), *solution, end]
            rows.append({"input_ids": [*prompt, *solution, end], "labels": labels})
    if not rows:
        raise DatasetError(
            f"every solution with its prompt is longer than {spec.max_length} tokens", mend="raise max_length"
        )
    return Dataset.from_list(rows), len(problems) - len(rows)


def boxed_solution(problem: Problem) -> str:
    """The solution, ending in the boxed answer: GSM8K's has no box, and an answer without one is never credited."""
    solution = problem.solution.strip()
    return solution if has_answer(solution) else f"{solution}\nThe answer is \\boxed{{{problem.answer}}}."
