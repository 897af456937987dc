"""Data sets resolve by name, stay inside the data root, and say what is wrong with them."""

import json

import pytest

from erpo_core.data.datasets import check_dataset, load_problems, parse_reference
from erpo_core.data.formats import BoxReport, Problem, is_answer, parse_lines, problems_digest
from erpo_core.data.reasoning_tasks import TASKS, plain_question
from erpo_core.data.worked_examples import ARITHMETIC
from erpo_core.errors import DatasetError, RunError, SpecError, UnknownReferenceError
from erpo_core.rewards.answers import extract_boxed

CHAIN_SUM = "reasoning-gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=2&size=20&seed=1"
GOOD = '{"problem": "What is 2 + 2?", "answer": "4"}'


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "data"
    (root / "uploads").mkdir(parents=True)
    (root / "sums.jsonl").write_text(f'{GOOD}\n\n{{"id": "b", "problem": "p", "answer": 5, "level": 3}}\n')
    (root / "uploads" / f"ds_{'a' * 32}.jsonl").write_text(GOOD)
    (tmp_path / "secret.jsonl").write_text(GOOD)
    (root / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    return root


def test_chain_sum_asks_as_a_person_would():
    pytest.importorskip("reasoning_gym")
    problems = load_problems(CHAIN_SUM, data_root=None)
    assert len(problems) == check_dataset(CHAIN_SUM, None) == 20
    for problem in problems:
        expression = problem.problem.removeprefix("What is ").removesuffix("?")
        first, sign, second = expression.split()
        assert int(problem.answer) == int(first) + int(f"{sign}{second}")
    assert problems == load_problems(CHAIN_SUM, data_root=None)
    assert problems != load_problems(CHAIN_SUM.replace("seed=1", "seed=2"), data_root=None)
    assert len({problem.id for problem in problems}) == 20


def test_other_questions_stay_as_they_are():
    assert plain_question("State the final answer to the following arithmetic problem: 4 + 3 =") == "What is 4 + 3?"
    assert plain_question("Calculate 5 - 3 - 6.") == "Calculate 5 - 3 - 6."


def test_the_shipped_task_names_are_those_of_the_package():
    factory = pytest.importorskip("reasoning_gym.factory")
    assert frozenset(factory.DATASETS) == TASKS


def test_the_api_checks_task_names_without_the_package(monkeypatch):
    monkeypatch.setattr("erpo_core.data.reasoning_tasks.importlib.util.find_spec", lambda name: None)
    assert check_dataset(CHAIN_SUM, None) == 20
    with pytest.raises(UnknownReferenceError):
        check_dataset("reasoning-gym:nonsense", None)
    with pytest.raises(RunError):
        load_problems(CHAIN_SUM, data_root=None)


@pytest.mark.parametrize(
    "ref",
    [
        "reasoning-gym:chain_sum?terms=2",
        "reasoning-gym:chain_sum?size=0",
        "reasoning-gym:chain_sum?size=1e9",
        "reasoning-gym:chain_sum?size=ten",
        "reasoning-gym:chain_sum?min_terms=5&max_terms=2",
        "reasoning-gym:chain_sum?seed=1&seed=2",
        "reasoning-gym:chain_sum?seed",
        "org/name?lines=3",
        "data:sums.jsonl?lines=3",
        "data:sums.jsonl?level=5-3",
        "data:sums.jsonl?level=",
    ],
)
def test_wrong_arguments_are_refused_with_a_mend(ref):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(SpecError) as caught:
        check_dataset(ref, None)
    assert (caught.value.pointer, bool(caught.value.mend)) == ("/dataset", True)


def test_a_file_of_the_data_root_gives_its_rows(root):
    assert check_dataset("data:sums.jsonl", root) == 2
    assert load_problems("data:sums.jsonl", data_root=root) == [
        Problem("sums/1", "What is 2 + 2?", "4"),
        Problem("b", "p", "5", level=3),
    ]
    assert len(load_problems("data:sums.jsonl", data_root=root, limit=1)) == 1
    assert check_dataset(f"ds_{'a' * 32}", root) == 1


@pytest.mark.parametrize(
    "ref",
    [
        "data:../secret.jsonl",
        "data:/etc/passwd",
        "data:link.jsonl",
        "data:absent.jsonl",
        f"data:uploads/ds_{'a' * 32}.jsonl",
        "data:",
        "data:.",
        f"ds_{'b' * 32}",
        "ds_../secret",
        "sums",
        "",
        "https://example.org/x.jsonl",
    ],
)
def test_nothing_outside_the_data_root_is_reached(root, ref):
    with pytest.raises(UnknownReferenceError) as caught:
        check_dataset(ref, root)
    assert caught.value.mend


def test_an_unknown_file_names_those_that_are_there(root):
    with pytest.raises(UnknownReferenceError) as caught:
        check_dataset("data:absent.jsonl", root)
    assert "data:sums.jsonl" in caught.value.mend


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        "null",
        '{"problem": "p"}',
        '{"answer": "4"}',
        '{"problem": "p", "answer": ""}',
        '{"problem": "p", "answer": "\\\\,"}',
        '{"problem": "p", "answer": "$$"}',
        '{"problem": "p", "answer": null}',
        '{"problem": "p", "answer": true}',
        '{"problem": "p", "answer": ["4"]}',
        '{"problem": "  ", "answer": "4"}',
        '{"problem": "p\\u0000", "answer": "4"}',
        "[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_a_broken_line_is_named_by_its_number(line):
    lines = [GOOD.encode(), b"", line if isinstance(line, bytes) else line.encode()]
    with pytest.raises(DatasetError, match=r"^line 3") as caught:
        list(parse_lines(lines, "file"))
    assert caught.value.mend


def test_an_id_that_comes_twice_is_refused():
    line = b'{"id": "x", "problem": "p", "answer": "1"}'
    with pytest.raises(DatasetError, match="line 2: the id 'x' stands in line 1"):
        list(parse_lines([line, line], "file"))


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_refused(root, text):
    (root / "empty.jsonl").write_text(text)
    with pytest.raises(DatasetError) as caught:
        check_dataset("data:empty.jsonl", root)
    assert caught.value.code == "empty_dataset"


def test_shuffling_repeats_with_its_seed(root):
    (root / "many.jsonl").write_text("\n".join(json.dumps({"problem": f"p{i}", "answer": i}) for i in range(30)))
    shuffled = load_problems("data:many.jsonl", data_root=root, seed=3)
    assert shuffled == load_problems("data:many.jsonl", data_root=root, seed=3)
    plain = load_problems("data:many.jsonl", data_root=root)
    assert shuffled != plain
    assert sorted(shuffled, key=lambda p: p.id) == sorted(plain, key=lambda p: p.id)
    assert problems_digest(shuffled) != problems_digest(plain)


PUBLISHED = [
    {"question": "q0", "answer": "so 2+2=<<2+2=4>>4\n#### 1,204"},
    {"problem": "q1", "solution": r"thus \boxed{\frac{1}{2}}", "level": "Level 5", "type": "Algebra"},
    {"problem": "q2", "solution": "no box", "level": "Level 3"},
    {"problem": "q3", "solution": r"either \boxed{1} or \boxed{2}", "level": "Level 3"},
    {"problem": "q4", "solution": r"nothing: \boxed{ }", "level": "Level 1"},
    {"problem": "q5", "solution": r"\boxed{7} is \boxed{7}.", "level": "Level 2"},
]


def check_published(problems, boxes, name, rows):
    assert [(p.problem, p.answer) for p in problems] == [
        ("q0", "1204"),
        ("q1", r"\frac{1}{2}"),
        ("q3", "2"),
        ("q5", "7"),
    ]
    assert problems[0].solution == "so 2+2=4"
    assert (problems[1].level, problems[1].subject) == (5, "Algebra")
    assert [boxes.none, boxes.empty, boxes.several] == [[name.format(n)] for n in rows]


def test_gsm8k_and_math_as_published_are_read_and_odd_boxes_are_reported(root):
    (root / "math.jsonl").write_text("\n".join(map(json.dumps, PUBLISHED)))
    boxes = BoxReport()
    problems = load_problems("data:math.jsonl", data_root=root, boxes=boxes)
    check_published(problems, boxes, "math/{}", (3, 5, 4))


def test_a_hubs_rows_are_read_the_same_way(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    # The hub's client takes a folder of that name first.
    (tmp_path / "org" / "math").mkdir(parents=True)
    (tmp_path / "org" / "math" / "train.jsonl").write_text("\n".join(map(json.dumps, PUBLISHED)))
    monkeypatch.chdir(tmp_path)
    boxes = BoxReport()
    problems = load_problems("org/math", data_root=None, cache_dir=tmp_path, boxes=boxes)
    check_published(problems, boxes, "org/math/{}", (2, 4, 3))
    kept = load_problems("org/math?level=3-5", data_root=None, cache_dir=tmp_path)
    assert [problem.problem for problem in kept] == ["q1", "q3"]


def test_a_hubs_rows_are_numbered_where_their_ids_repeat(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    rows = [{"id": str(number % 3), "problem": f"p{number}", "answer": str(number)} for number in range(9)]
    for name, content in (("org/repeated", rows), ("org/own", rows[:3])):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "train.jsonl").write_text("\n".join(map(json.dumps, content)))
    monkeypatch.chdir(tmp_path)
    repeated = load_problems("org/repeated", data_root=None, cache_dir=tmp_path)
    assert [problem.id for problem in repeated] == [f"org/repeated/{number}" for number in range(9)]
    assert [problem.problem for problem in repeated] == [row["problem"] for row in rows]
    assert [problem.id for problem in load_problems("org/own", data_root=None, cache_dir=tmp_path)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("level", "kept"),
    [("3-5", ["5", "3"]), ("5", ["5"]), ("1, 3", ["3", "1"]), ("hard", ["Hard"]), ("1-9", None)],
)
def test_levels_are_kept_by_number_range_or_name(root, level, kept):
    levels = [5, "Level 3", "Hard", 1, None]
    rows = [{"problem": f"p{i}", "answer": i, "level": level} for i, level in enumerate(levels)]
    (root / "levels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ref = f"data:levels.jsonl?level={level}"
    found = [str(problem.level) for problem in load_problems(ref, data_root=root)]
    assert found == (["5", "3", "1"] if kept is None else kept)
    assert check_dataset(ref, root) == len(found)


def test_a_level_that_no_problem_has_is_refused_and_the_known_ones_are_named(root):
    with pytest.raises(DatasetError) as caught:
        check_dataset("data:sums.jsonl?level=4-5", root)
    assert "levels there: 3" in caught.value.mend


def test_only_problems_with_solutions_can_be_imitated(root):
    rows = [{"problem": "p", "answer": 1, "solution": "one"}, {"problem": "q", "answer": 2}]
    (root / "half.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert check_dataset("data:half.jsonl", root, with_solutions=True) == 1
    for ref in ("data:sums.jsonl", CHAIN_SUM):
        with pytest.raises(DatasetError) as caught:
            check_dataset(ref, root, with_solutions=True)
        assert (caught.value.pointer, caught.value.code) == ("/dataset", "no_solutions")


def test_a_hub_name_is_taken_apart():
    found = parse_reference("openai/gsm8k@main?config=main&split=test")
    assert (found.source, found.name, found.args) == ("hub", "openai/gsm8k@main", {"config": "main", "split": "test"})
    assert check_dataset("openai/gsm8k", None) is None


@pytest.mark.parametrize(
    ("answer", "expected"), [(r"\infty", True), ("-", True), (r"\{\}", False), (r"\text{}", False)]
)
def test_an_answer_has_content(answer, expected):
    assert is_answer(answer) is expected


def test_worked_examples_end_in_the_right_box():
    for example in ARITHMETIC:
        expression = example.problem.removeprefix("What is ").removesuffix("?")
        first, sign, second = expression.split()
        assert extract_boxed(example.solution) == str(int(first) + int(f"{sign}{second}"))
