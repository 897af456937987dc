"""Benchmarks have names, their problems come from the user, and what cannot be the benchmark is refused."""

import json

import pytest

from erpo_core.data.benchmarks import BENCHMARKS
from erpo_core.data.datasets import check_dataset, load_problems
from erpo_core.data.golds import check_dataset_golds, check_golds
from erpo_core.data.store import fetch_benchmark, import_file
from erpo_core.errors import DatasetError, RunError, SpecError, UnknownReferenceError
from erpo_core.rewards.verify import Reading, Verifier
from erpo_core.specs.evaluate import EvaluateSpec


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(count, **more):
    return [{"id": f"s/{i}", "problem": f"What is {i} + 1?", "answer": str(i + 1), **more} for i in range(count)]


def test_sizes_are_those_of_the_paper_and_no_problem_is_shipped():
    sizes = {name: row.num_problems for name, row in BENCHMARKS.items()}
    assert sizes == {
        **{"amc23": 40, "aime24": 30, "aime25": 30, "minerva_math": 272, "minerva40": 40},
        **{"math500": 500, "math": 5000, "gsm8k": 1319},
    }
    assert all(row.license and row.source for row in BENCHMARKS.values())
    assert BENCHMARKS["minerva40"].num_rows == 272


def test_a_benchmark_is_read_from_its_file(tmp_path):
    write(tmp_path / "amc23.jsonl", sums(40))
    assert check_dataset("amc23", tmp_path) == 40
    assert [p.id for p in load_problems("amc23", data_root=tmp_path, limit=2)] == ["s/0", "s/1"]


def test_minerva40_is_the_first_40_by_number_whatever_the_order_of_the_file(tmp_path):
    rows = sorted(sums(272), key=lambda row: row["id"])
    assert [row["id"] for row in rows[:3]] == ["s/0", "s/1", "s/10"]
    write(tmp_path / "minerva_math.jsonl", rows)
    assert [p.id for p in load_problems("minerva40", data_root=tmp_path)] == [f"s/{i}" for i in range(40)]
    assert check_dataset("minerva_math", tmp_path) == 272


def test_levels_and_subjects_choose(tmp_path):
    rows = [row | {"level": f"Level {i % 5 + 1}", "type": "x", "subject": "Number Theory" if i % 2 else "Algebra"}
            for i, row in enumerate(sums(20))]  # fmt: skip
    write(tmp_path / "math500.jsonl", rows)
    assert check_dataset("math500?level=5", tmp_path) == 4
    assert check_dataset("math500?level=4,5", tmp_path) == 8
    assert check_dataset("math500?subject=number_theory&level=2", tmp_path) == 2
    assert {p.level for p in load_problems("math500?level=3", data_root=tmp_path)} == {3}
    with pytest.raises(DatasetError) as caught:
        check_dataset("math500?level=9", tmp_path)
    assert caught.value.mend == "levels there: 1, 2, 3, 4, 5"
    with pytest.raises(SpecError, match="takes no argument 'split'"):
        check_dataset("math500?split=test", tmp_path)


def test_an_absent_benchmark_says_how_to_get_it(tmp_path):
    for root in (tmp_path, None):
        with pytest.raises(UnknownReferenceError) as caught:
            check_dataset("aime24", root)
        assert caught.value.code == "benchmark_absent"
        assert "erpo data fetch aime24" in caught.value.mend
        assert "erpo data import" in caught.value.mend


def test_an_unknown_benchmark_names_the_known_ones(tmp_path):
    with pytest.raises(UnknownReferenceError) as caught:
        check_dataset("amc24", tmp_path)
    assert all(name in caught.value.mend for name in BENCHMARKS)


def test_an_imported_file_keeps_its_bytes(tmp_path):
    source = write(tmp_path / "amc23.jsonl", sums(40))
    stored = import_file(source, tmp_path / "root")
    assert (stored.dataset, stored.num_problems, stored.num_text_golds) == ("amc23", 40, 0)
    assert stored.path.read_bytes() == source.read_bytes()
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["amc23.jsonl"]
    assert import_file(write(tmp_path / "mine.jsonl", sums(3)), tmp_path / "root").dataset == "data:mine.jsonl"
    assert check_dataset("data:mine.jsonl", tmp_path / "root") == 3


def test_the_name_of_a_benchmarks_file_is_enough(tmp_path):
    stored = import_file(write(tmp_path / "gsm8k_test.jsonl", sums(1319)), tmp_path / "root")
    assert stored.dataset == "gsm8k"


@pytest.mark.parametrize("name", ["aime24", "minerva40", "../evil", "", ".hidden", "a/b"])
def test_what_is_not_the_benchmark_or_has_no_name_is_refused(tmp_path, name):
    source = write(tmp_path / ".jsonl", sums(40))
    with pytest.raises(SpecError):
        import_file(source, tmp_path / "root", name=name or ".jsonl")
    assert not (tmp_path / "root").exists()


def test_a_broken_line_is_refused_by_its_number_and_nothing_is_stored(tmp_path):
    source = tmp_path / "mine.jsonl"
    source.write_text('{"problem": "p", "answer": "1"}\n{"problem": "p"}\n')
    with pytest.raises(DatasetError, match=r"^line 2"):
        import_file(source, tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_fetching_stores_rows_under_our_names(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [{"question": f"q{i}", "answer": f"#### {i}", "type": "Sums", "level": "Level 2"} for i in range(40)]
    asked = []

    def load_dataset(*names, **more):
        asked.append((names, more["split"]))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    stored = fetch_benchmark("amc23", tmp_path)
    assert asked == [(("math-ai/amc23", None), "test")]
    assert json.loads(stored.path.read_text().splitlines()[7]) == {
        **{"id": "amc23/7", "problem": "q7", "answer": "7", "level": 2, "subject": "Sums", "solution": ""},
        "source": "math-ai/amc23?split=test (AMC 12A and 12B 2023)",
    }
    assert check_dataset("amc23", tmp_path) == 40


def test_without_the_hub_the_way_by_file_is_named(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(RunError, match=r"out of reach.*erpo data import FILE --name amc23"):
        fetch_benchmark("amc23", tmp_path)


def test_golds_are_read_before_anything_is_sampled(tmp_path):
    pytest.importorskip("math_verify")
    good = [r"\frac{1}{2}", "7", r"\text{Evelyn}", "(1,2)", r"\infty"]
    with Verifier() as verifier:
        assert set(verifier.read_golds(good)) == {Reading.EXPRESSION}
        assert verifier.read_golds(["+"]) == [Reading.TEXT]
        assert verifier.read_golds([r"\sin^2 t", r"\frac{}{}", "7"]) == [
            *(Reading.TEXT, Reading.NOTHING, Reading.EXPRESSION)
        ]
        write(tmp_path / "texts.jsonl", [{"problem": "p", "answer": answer} for answer in (r"\sin^2 t", "3", "4x")])
        assert check_golds(load_problems("data:texts.jsonl", data_root=tmp_path), verifier) == 1
    rows = [*sums(2), {"id": "bad", "problem": "p", "answer": r"\frac{}{}"}]
    write(tmp_path / "bad.jsonl", rows)
    for _ in range(2):
        with pytest.raises(DatasetError, match="answer of bad") as caught:
            check_dataset_golds("data:bad.jsonl", tmp_path)
        assert caught.value.code == "unreadable_gold"
    write(tmp_path / "bad.jsonl", sums(3))
    check_dataset_golds("data:bad.jsonl", tmp_path)


def test_pass_at_follows_the_samples_unless_it_is_asked_for():
    body = {"model": "m", "dataset": "amc23"}
    assert EvaluateSpec(**body).pass_at == (1, 2, 4, 8, 16)
    few = EvaluateSpec(**body, num_samples=5)
    assert few.pass_at == (1, 2, 4)
    assert EvaluateSpec.model_validate(few.model_dump(mode="json")) == few
    with pytest.raises(ValueError, match=r"pass@8 needs 8 samples.*write k up to 5"):
        EvaluateSpec(**body, num_samples=5, pass_at=[1, 8])
