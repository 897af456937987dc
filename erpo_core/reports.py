"""Tables in the shape of the paper's Tables 1 (Acc, Fmt) and 2 (pass@k), from the results of evaluations. Light."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

PAPER = "arXiv 2603.28204, Tables 1 and 2, as printed: 16 samples a problem; its 40 problems of Minerva are not named"
PAPER_NAMES = {"amc23": "amc23", "minerva40": "minerva", "aime24": "aime24", "aime25": "aime25"}
"""Our benchmark, its name in the paper's tables; in the order of the paper's columns."""
_TITLES = {"amc23": "AMC23", "minerva": "Minerva", "aime24": "AIME24", "aime25": "AIME25", "average": "Average"}
_FIELDS = {"acc": "Acc", "fmt": "Fmt"}
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {char: f"\\{char}" for char in "&%$#_{}"}


@dataclass(frozen=True)
class Entry:
    """One evaluation. ``model``: what tells its weights from others'; ``result``: of :func:`summarise`."""

    run_id: str
    model: str
    label: str
    benchmark: str
    result: Mapping[str, Any]


@dataclass
class Row:
    """One model. ``cells``: by column, ``{"value", "low", "high"}`` in percent."""

    label: str
    source: str
    cells: dict[str, dict[str, float | None]] = field(default_factory=dict)
    evaluations: dict[str, str] = field(default_factory=dict)
    truncated: dict[str, float] = field(default_factory=dict)


@dataclass
class Table:
    """``columns`` in the form ``amc23_acc`` or ``amc23_pass@4``, as in the paper's CSV files."""

    columns: list[str]
    rows: list[Row]


def accuracy_table(entries: Sequence[Entry], *, paper: bool = False) -> Table:
    """Acc and Fmt of each benchmark: Table 1. Of several the averages, for the models that have all of them.

    Raises:
        ValueError: a model has two evaluations of one benchmark.
    """
    shorts = _benchmarks(entries)
    groups = [*shorts, "average"] if len(shorts) > 1 else shorts
    table = Table([f"{short}_{name}" for short in groups for name in _FIELDS], _rows(entries, _accuracy))
    if paper:
        table.rows += paper_rows("table1.csv", table.columns, keep_average=set(shorts) == set(PAPER_NAMES.values()))
    for row in table.rows:
        for name in _FIELDS:
            values = [row.cells.get(f"{short}_{name}", {}).get("value") for short in shorts]
            if None not in values and len(values) > 1:
                average = {"value": sum(values) / len(values), "low": None, "high": None}
                row.cells.setdefault(f"average_{name}", average)
    return table


def passk_table(entries: Sequence[Entry], *, paper: bool = False) -> Table:
    """pass@k of each benchmark for every k above 1 that is given: Table 2.

    Raises:
        ValueError: a model has two evaluations of one benchmark.
    """
    ks = sorted({int(k) for entry in entries for k in entry.result["pass_at"]} - {1})
    columns = [f"{short}_pass@{k}" for short in _benchmarks(entries) for k in ks]
    table = Table(columns, _rows(entries, _passk))
    if paper:
        table.rows += paper_rows("table2.csv", columns)
    return table


def short_name(benchmark: str) -> str:
    """A benchmark's name in columns."""
    return PAPER_NAMES.get(benchmark, benchmark)


def paper_rows(file: str, columns: Iterable[str], *, keep_average: bool = True) -> list[Row]:
    """The rows of one of the paper's tables, as far as ``columns`` ask for them."""
    wanted = {name for name in columns if keep_average or not name.startswith("average_")}
    rows = []
    for values in _paper(file):
        cells = {
            name: {"value": float(value), "low": None, "high": None} for name, value in values.items() if name in wanted
        }
        if cells:
            rows.append(Row(values["model"], "paper", cells))
    return rows


@cache
def _paper(file: str) -> list[dict[str, str]]:
    text = (files("erpo_core.data") / "paper" / file).read_text()
    return list(csv.DictReader(io.StringIO(text)))


def _benchmarks(entries: Sequence[Entry]) -> list[str]:
    """Short names, the paper's first and in its order."""
    found = dict.fromkeys(short_name(entry.benchmark) for entry in entries)
    return [name for name in PAPER_NAMES.values() if name in found] + [n for n in found if n not in _TITLES]


def _rows(entries: Sequence[Entry], cells: Any) -> list[Row]:
    rows: dict[str, Row] = {}
    for entry in entries:
        row, short = rows.setdefault(entry.model, Row(entry.label, "run")), short_name(entry.benchmark)
        if short in row.evaluations:
            raise ValueError(
                f"{row.evaluations[short]} and {entry.run_id} are evaluations of one model on {entry.benchmark}"
            )
        row.evaluations[short] = entry.run_id
        row.truncated[short] = entry.result["truncated"]
        row.cells |= {f"{short}_{name}": _percent(value) for name, value in cells(entry.result)}
    return list(rows.values())


def _accuracy(result: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(name, result[name]) for name in _FIELDS]


def _passk(result: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(f"pass@{k}", value) for k, value in result["pass_at"].items() if k != "1"]


def _percent(value: Mapping[str, float]) -> dict[str, float | None]:
    return {name: 100 * value[name] for name in ("value", "low", "high")}


def to_csv(table: Table) -> str:
    """The header and the two decimals of the paper's CSV files."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", *table.columns])
    writer.writerows([_label(row), *(_text(row, name) for name in table.columns)] for row in table.rows)
    return text.getvalue()


def to_markdown(table: Table, notes: Sequence[str] = ()) -> str:
    """A table with 95% intervals in brackets, and the notes below it."""
    head = ["Model", *(" ".join(_title(name)) for name in table.columns)]
    body = [[_label(row).replace("|", r"\|"), *(_with_interval(row, name) for name in table.columns)]
            for row in table.rows]  # fmt: skip
    lines = [head, ["---", *["---:"] * len(table.columns)], *body]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text + "".join(f"\n{note}\n" for note in notes)


def to_latex(table: Table, notes: Sequence[str] = ()) -> str:
    """A tabular for the package booktabs, benchmarks spanning their columns; the notes as comments."""
    titles = [_title(name) for name in table.columns]
    groups: list[tuple[str, int]] = []
    for group, _ in titles:
        same = bool(groups) and groups[-1][0] == group
        groups[-1:] = [(group, groups[-1][1] + 1)] if same else [*groups[-1:], (group, 1)]
    spans = "".join(f" & \\multicolumn{{{count}}}{{c}}{{{_escape(group)}}}" for group, count in groups)
    lines = [f"\\begin{{tabular}}{{l{'r' * len(titles)}}}", "\\toprule", f"{spans} \\\\"]
    lines += ["Model" + "".join(f" & {_escape(name)}" for _, name in titles) + " \\\\", "\\midrule"]
    for row in table.rows:
        lines.append(_escape(_label(row)) + "".join(f" & {_text(row, name)}" for name in table.columns) + " \\\\")
    lines += ["\\bottomrule", "\\end{tabular}"]
    return "\n".join([*lines, *(f"% {note}" for note in notes)]) + "\n"


def _title(column: str) -> tuple[str, str]:
    short, _, name = column.rpartition("_")
    return _TITLES.get(short, short), _FIELDS.get(name, name)


def _label(row: Row) -> str:
    return f"{row.label} (paper)" if row.source == "paper" else row.label


def _text(row: Row, column: str) -> str:
    value = row.cells.get(column, {}).get("value")
    return "" if value is None else f"{value:.2f}"


def _with_interval(row: Row, column: str) -> str:
    cell = row.cells.get(column, {})
    if cell.get("low") is None or cell.get("high") is None:
        return _text(row, column)
    return f"{_text(row, column)} [{cell['low']:.1f}, {cell['high']:.1f}]"


def _escape(text: str) -> str:
    return "".join(_LATEX.get(char, char) for char in text)
