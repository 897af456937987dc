"""Benchmarks that one word names. Light.

Only names, sizes and licences stand here: the problems of MATH, AMC, AIME and Minerva may not be passed on, so their
files come from the user (``erpo data import``) or from the hub (``erpo data fetch``) into the data root.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from erpo_core.data.formats import Problem, read_jsonl
from erpo_core.data.levels import of_levels
from erpo_core.errors import DatasetError, UnknownReferenceError

_MAA = "Problem text: Mathematical Association of America; not to be passed on"
_MATH = "MIT as published; contested (DMCA notice of Art of Problem Solving, 2025-01-02)"
_OCW = "Problem text: MIT OpenCourseWare, CC BY-NC-SA"


@dataclass(frozen=True)
class Benchmark:
    """A named set of problems: its file in the data root, and where the hub has it."""

    name: str
    file: str
    num_problems: int
    license: str
    source: str
    hub: str
    first: int | None = None
    """Only the first problems, in the order of the numbers in their ids."""

    @property
    def num_rows(self) -> int:
        """Rows that the whole file has."""
        return BENCHMARKS[Path(self.file).stem].num_problems if self.first else self.num_problems


def _registry(*rows: Benchmark) -> dict[str, Benchmark]:
    return {row.name: row for row in rows}


_MINERVA = {"file": "minerva_math.jsonl", "license": _OCW, "hub": "math-ai/minervamath?split=test"}
BENCHMARKS = _registry(
    Benchmark("aime24", "aime24.jsonl", 30, _MAA, "AIME I and II 2024", "math-ai/aime24?split=test"),
    Benchmark("aime25", "aime25.jsonl", 30, _MAA, "AIME I and II 2025", "math-ai/aime25?split=test"),
    Benchmark("amc23", "amc23.jsonl", 40, _MAA, "AMC 12A and 12B 2023", "math-ai/amc23?split=test"),
    Benchmark(
        "gsm8k",
        "gsm8k_test.jsonl",
        1319,
        "MIT",
        "openai/grade-school-math, test split",
        "openai/gsm8k?config=main&split=test",
    ),
    Benchmark(
        "math",
        "math_test.jsonl",
        5000,
        _MATH,
        "hendrycks/math, test split; by level: `math?level=5`",
        "DigitalLearningGmbH/MATH-lighteval?split=test",
    ),
    Benchmark(
        "math500",
        "math500.jsonl",
        500,
        _MATH,
        "openai/prm800k, 500 problems of the MATH test split; by level: `math500?level=4,5`",
        "HuggingFaceH4/MATH-500?split=test",
    ),
    Benchmark("minerva_math", num_problems=272, source="OCWCourses of Minerva (Lewkowycz et al., 2022)", **_MINERVA),
    Benchmark("minerva40", num_problems=40, source="The first 40 of minerva_math by id", first=40, **_MINERVA),
)
"""By name. The paper evaluated 40 problems of Minerva and does not say which: the first 40 are our convention."""


def known_benchmarks() -> str:
    """The names, for a message."""
    return ", ".join(sorted(BENCHMARKS))


def is_present(benchmark: Benchmark, data_root: Path | None) -> bool:
    """Is its file in the data root?"""
    return data_root is not None and (Path(data_root) / benchmark.file).is_file()


def read_benchmark(
    name: str, args: dict[str, Any], data_root: Path | None, *, pointer: str = "/dataset"
) -> list[Problem]:
    """The problems of a benchmark, or those of the wanted levels and subjects.

    Raises:
        UnknownReferenceError: ``benchmark_absent``: its file is not in the data root.
        DatasetError: a broken line, or no problem of that level or subject.
    """
    benchmark = BENCHMARKS[name]
    if not is_present(benchmark, data_root):
        raise UnknownReferenceError(
            f"the file of {name}, {benchmark.file}, is not in the data root",
            pointer=pointer,
            mend=f"run `erpo data fetch {name}` where the hub is in reach, or `erpo data import FILE --name {name}`",
            code="benchmark_absent",
        )
    problems = read_jsonl(Path(data_root) / benchmark.file, pointer=pointer)
    if benchmark.first:
        problems = sorted(problems, key=_by_numbers)[: benchmark.first]
    problems = of_levels(problems, args.get("level"), pointer=pointer)
    return problems if "subject" not in args else _of_subjects(problems, args["subject"], pointer)


def check_rows(benchmark: Benchmark, problems: Sequence[Problem]) -> None:
    """Refuse a file that cannot be the whole benchmark.

    Raises:
        DatasetError: it has another number of problems.
    """
    if len(problems) != benchmark.num_rows:
        raise DatasetError(
            f"{benchmark.file} has {benchmark.num_rows} problems; this file has {len(problems)}",
            mend="give the whole set, or import it under another name and write `data:<name>.jsonl`",
        )


def _of_subjects(problems: Sequence[Problem], wanted: str, pointer: str) -> list[Problem]:
    names = {_plain(part) for part in wanted.split(",")}
    found = [problem for problem in problems if _plain(problem.subject) in names]
    if not found:
        there = sorted({problem.subject for problem in problems if problem.subject is not None})
        raise DatasetError(
            f"no problem has subject {wanted!r}",
            pointer=pointer,
            mend=f"write one of {', '.join(there)}" if there else "leave subject out: the file names none",
        )
    return found


def _plain(value: Any) -> str:
    return re.sub(r"[\s_&]+", " ", str(value)).strip().lower()


def _by_numbers(problem: Problem) -> list[Any]:
    """``minerva_math/9`` before ``minerva_math/10``."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", problem.id)]
