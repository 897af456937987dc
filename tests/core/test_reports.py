"""Tables in the shape of the paper's, and the paper's own cells out of our pass@k."""

import csv
import io
from functools import cache
from math import comb

import pytest

from erpo_core.passk import pass_at_k
from erpo_core.reports import Entry, accuracy_table, paper_rows, passk_table, to_csv, to_latex, to_markdown

PROBLEMS = {"amc23": 40, "minerva": 40, "aime24": 30, "aime25": 30}
N = 16
KS = (2, 4, 8, 16)


def result(acc, fmt, truncated=0.0, **pass_at):
    def interval(v):
        return {"value": v, "low": v - 0.05, "high": v + 0.05}

    return {
        "acc": interval(acc),
        "fmt": interval(fmt),
        "truncated": truncated,
        "pass_at": {"1": interval(acc)} | {k[1:]: interval(v) for k, v in pass_at.items()},
    }


def entries():
    made = [("amc23", 0.25, 0.75), ("minerva40", 0.125, 1.0), ("aime24", 0.0, 0.5), ("aime25", 0.5, 0.75)]
    return [Entry(f"run_{name}", "m+a", "SmolLM2 & co_1", name, result(a, f, k2=a + 0.1)) for name, a, f in made]


def test_a_row_of_table_1_has_the_papers_columns():
    table = accuracy_table(entries(), paper=True)
    (header, ours, first, *others) = list(csv.reader(io.StringIO(to_csv(table))))
    with open(csv_of("table1.csv")) as file:
        paper = list(csv.reader(file))
    assert header == paper[0]
    assert ours == [
        "SmolLM2 & co_1",
        *("25.00", "75.00", "12.50", "100.00", "0.00", "50.00", "50.00", "75.00", "21.88", "75.00"),
    ]
    assert [first[0].removesuffix(" (paper)"), *first[1:]] == paper[1]
    assert len(others) + 1 == len(paper) - 1 == 14


def csv_of(name):
    from importlib.resources import files

    return files("erpo_core.data") / "paper" / name


def test_a_row_of_table_2_has_the_ks_that_were_measured():
    table = passk_table(entries()[:1], paper=True)
    assert table.columns == ["amc23_pass@2"]
    assert table.rows[0].cells["amc23_pass@2"] == {"value": 35.0, "low": 30.0, "high": 40.0}
    last = table.rows[-1]
    assert (last.label, last.source) == ("Qwen2.5-7B-ERPO", "paper")
    assert last.cells == {"amc23_pass@2": {"value": 63.40, "low": None, "high": None}}


def test_averages_need_every_benchmark():
    other = Entry("run_x", "m2", "other", "amc23", result(0.5, 1.0))
    table = accuracy_table([*entries(), other])
    assert "average_acc" in table.rows[0].cells
    assert "average_acc" not in table.rows[1].cells
    assert to_csv(table).splitlines()[2] == "other,50.00,100.00,,,,,,,,"


def test_other_benchmarks_follow_under_their_own_names():
    own = Entry("run_x", "m", "m", "data:sums.jsonl", result(0.5, 1.0))
    amc = Entry("run_y", "m", "m", "amc23", result(0.5, 1.0))
    table = accuracy_table([own, amc], paper=True)
    assert table.columns[:4] == ["amc23_acc", "amc23_fmt", "data:sums.jsonl_acc", "data:sums.jsonl_fmt"]
    assert {"average_acc", "data:sums.jsonl_acc"}.isdisjoint(table.rows[-1].cells)


def test_one_model_twice_on_a_benchmark_is_refused():
    with pytest.raises(ValueError, match="run_amc23 and run_z"):
        accuracy_table([*entries(), Entry("run_z", "m+a", "again", "amc23", result(0.5, 1.0))])


def test_markdown_has_intervals_and_notes_and_latex_is_escaped():
    table = accuracy_table(entries()[:2])
    markdown = to_markdown(table, ["A note."])
    assert markdown.splitlines()[0] == (
        "| Model | AMC23 Acc | AMC23 Fmt | Minerva Acc | Minerva Fmt | Average Acc | Average Fmt |"
    )
    assert "| 25.00 [20.0, 30.0] |" in markdown
    assert markdown.endswith("\nA note.\n")
    latex = to_latex(table, ["A note."])
    assert r"& \multicolumn{2}{c}{AMC23} & \multicolumn{2}{c}{Minerva} & \multicolumn{2}{c}{Average} \\" in latex
    assert r"SmolLM2 \& co\_1 & 25.00 & 75.00 &" in latex
    assert latex.count("{") == latex.count("}")
    assert latex.endswith("% A note.\n")


def cells(file):
    return {
        row.label: {name: cell["value"] for name, cell in row.cells.items()} for row in paper_rows(file, columns(file))
    }


@cache
def columns(file):
    with open(csv_of(file)) as text:
        return tuple(next(csv.reader(text))[1:])


def printed(exact: float) -> set[float]:
    """What a share may be printed as: percent at two decimals, a half rounded either way."""
    return {round(100 * exact + nudge, 2) for nudge in (-1e-7, 0, 1e-7)}


def test_every_cell_of_the_paper_is_a_count_of_answers_or_of_problems():
    for label, row in cells("table1.csv").items():
        for benchmark, problems in PROBLEMS.items():
            for name in ("acc", "fmt"):
                value = row[f"{benchmark}_{name}"]
                assert value in printed(round(value / 100 * problems * N) / (problems * N)), (label, benchmark, name)
            assert row[f"{benchmark}_acc"] <= row[f"{benchmark}_fmt"], (label, benchmark)
    for label, row in cells("table2.csv").items():
        for benchmark, problems in PROBLEMS.items():
            value = row[f"{benchmark}_pass@16"]
            assert value in printed(round(value / 100 * problems) / problems), (label, benchmark)


def partitions(total, parts, largest=N):
    """Multisets of right answers: ``parts`` numbers from 1 to ``largest`` with the sum ``total``."""
    if parts == 0:
        if total == 0:
            yield ()
        return
    for first in range(min(largest, total - parts + 1), (total - 1) // parts, -1):
        for rest in partitions(total - first, parts - 1, first):
            yield (first, *rest)


def determined():
    """(model, benchmark, solved problems, right answers) where Acc and pass@16 leave few multisets of counts."""
    found = []
    for label, row in cells("table2.csv").items():
        for benchmark, problems in PROBLEMS.items():
            solved = round(row[f"{benchmark}_pass@16"] / 100 * problems)
            right = round(cells("table1.csv")[label][f"{benchmark}_acc"] / 100 * problems * N)
            if comb(max(right - 1, 0), max(solved - 1, 0)) <= 3e6:
                found.append((label, benchmark, solved, right))
    return found


@pytest.mark.parametrize(("label", "benchmark", "solved", "right"), determined())
def test_our_pass_at_k_prints_the_papers_cells(label, benchmark, solved, right):
    row, problems = cells("table2.csv")[label], PROBLEMS[benchmark]
    fitting = [
        counts
        for counts in partitions(right, solved)
        if all(row[f"{benchmark}_pass@{k}"] in printed(sum(pass_at_k(N, c, k) for c in counts) / problems) for k in KS)
    ]
    assert fitting
