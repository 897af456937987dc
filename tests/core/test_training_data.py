"""Prompts of a training: which are left out, how long answers may be, what is reported."""

import json

import pytest
from test_trainer import Records

from erpo_core.data.formats import Problem
from erpo_core.errors import DatasetError
from erpo_core.job import JobInputs, ModelInput
from erpo_core.prompts import prompt_ids
from erpo_core.specs import parse_spec
from erpo_core.specs.common import PromptSpec
from erpo_core.trainer.data import load_training_problems, make_dataset, with_completion_length
from tiny_model import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()
PROBLEMS = [Problem(str(n), "x" * n, "1") for n in (10, 20, 30, 40)]
SHORTEST = len(prompt_ids(TOKENIZER, PROBLEMS[0].problem, PromptSpec()))


def spec(**changes):
    return parse_spec("train", {"model": "m", "dataset": "data:math.jsonl"} | changes)


def lengths_for(**changes) -> tuple[list[int], int, int]:
    """Prompt lengths above the shortest, dropped problems, and the answers' greatest length."""
    wanted = spec(generation_batch_size=8, **changes)
    dataset, dropped = make_dataset(TOKENIZER, PROBLEMS, wanted)
    found = [len(ids) - SHORTEST for ids in dataset["prompt_ids"]]
    return found, dropped, with_completion_length(wanted, dataset).max_completion_length


def test_answers_may_be_as_long_as_the_longest_prompt_leaves():
    assert lengths_for() == ([0, 10, 20, 30], 0, 2048 - SHORTEST - 30)
    assert lengths_for(max_prompt_length=SHORTEST + 15) == ([0, 10], 2, 2048 - SHORTEST - 10)
    assert lengths_for(max_length=2 * SHORTEST + 20) == ([0, 10], 2, SHORTEST + 10)


def test_a_given_length_of_answers_bounds_the_prompts():
    assert lengths_for(max_length=SHORTEST + 120, max_completion_length=100) == ([0, 10, 20], 1, 100)


def test_where_no_prompt_is_short_enough_the_mend_is_told():
    with pytest.raises(DatasetError, match="every prompt is longer than 5 tokens") as caught:
        lengths_for(max_prompt_length=5)
    assert caught.value.mend


def test_golds_from_odd_solutions_are_reported_by_their_rows(tmp_path):
    solutions = ["so \\boxed{1}", "none", "\\boxed{}", "\\boxed{1} or \\boxed{2}"]
    rows = [{"problem": f"p{n}", "solution": solution} for n, solution in enumerate(solutions)]
    (tmp_path / "math.jsonl").write_text("\n".join(map(json.dumps, rows)))
    inputs = JobInputs("job", "run", 1, tmp_path, tmp_path, ModelInput("m"), data_root=tmp_path)
    records = Records()
    assert [problem.answer for problem in load_training_problems(spec(), inputs, records)] == ["1", "2"]
    (event,) = records.by_kind["event"]
    assert (event.type, event.level) == ("dataset.boxes", "warn")
    assert event.data == {"none": ["math/2"], "empty": ["math/3"], "several": ["math/4"]}
    assert event.message.startswith("golds read from solutions: 1 rows have no box and 1 an empty one")
