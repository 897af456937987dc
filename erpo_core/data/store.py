"""Problem files into the data root: imported from a file, or fetched from the hub. Whole and checked, or not at all."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from erpo_core.data.benchmarks import BENCHMARKS, Benchmark, check_rows, known_benchmarks
from erpo_core.data.datasets import load_hub, parse_reference
from erpo_core.data.formats import BoxReport, Problem, parse_lines
from erpo_core.data.golds import check_golds
from erpo_core.errors import DatasetError, SpecError, UnknownReferenceError
from erpo_core.rewards.verify import Verifier, verifier_version

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")


@dataclass(frozen=True)
class Stored:
    """What has been stored: the name to write as ``dataset``, and what was seen in it."""

    dataset: str
    path: Path
    num_problems: int
    num_text_golds: int | None
    """Golds that are compared as text only; None where math-verify is not installed to tell."""


def import_file(source: Path, data_root: Path, *, name: str | None = None) -> Stored:
    """Put a JSONL file into the data root, byte for byte. Without ``name`` its own name counts.

    Raises:
        DatasetError: a broken line, an unreadable gold, or not the number of problems that the benchmark has.
        SpecError: a name that is no file name.
    """
    name = (name or source.stem).removesuffix(".jsonl")
    benchmark = _benchmark_of(name)
    if not benchmark and not _NAME.fullmatch(name):
        raise SpecError(f"{name!r} is no name for a data set", mend="write letters, digits, `-`, `_` and `.`")
    content = source.read_bytes()
    problems = list(parse_lines(content.splitlines(), Path(benchmark.file).stem if benchmark else name))
    if not problems:
        raise DatasetError(f"{source.name} holds no problem", code="empty_dataset")
    return _store(content, problems, data_root, benchmark, name)


def fetch_benchmark(name: str, data_root: Path, *, cache_dir: Path | None = None) -> Stored:
    """Get a benchmark from the hub into the data root, as rows of ``id``, ``problem``, ``answer``, ``source``.

    Raises:
        UnknownReferenceError: no such benchmark.
        RunError: ``dataset_unavailable``: the hub is out of reach or refuses.
        DatasetError: what came is not the whole benchmark, or unreadable.
    """
    benchmark = BENCHMARKS.get(name)
    if benchmark is None:
        raise UnknownReferenceError(f"unknown benchmark {name!r}", mend=f"name one of {known_benchmarks()}")
    instead = f"bring its file along and run `erpo data import FILE --name {name}`"
    problems = load_hub(parse_reference(benchmark.hub), cache_dir, BoxReport(), instead=instead)
    stem = Path(benchmark.file).stem
    rows = [_row(problem, f"{stem}/{index}", benchmark) for index, problem in enumerate(problems)]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    return _store(content, list(parse_lines(content.splitlines(), stem)), data_root, benchmark, name)


def _row(problem: Problem, number: str, benchmark: Benchmark) -> dict[str, object]:
    row = {**asdict(problem), "id": number, "source": f"{benchmark.hub} ({benchmark.source})"}
    return {key: value for key, value in row.items() if value is not None}


def _benchmark_of(name: str) -> Benchmark | None:
    """By its name, or by that of its file."""
    by_file = (row for row in BENCHMARKS.values() if Path(row.file).stem == name and not row.first)
    return BENCHMARKS.get(name) or next(by_file, None)


def _store(
    content: bytes, problems: Sequence[Problem], data_root: Path, benchmark: Benchmark | None, name: str
) -> Stored:
    if benchmark:
        check_rows(benchmark, problems)
    num_text = None
    if verifier_version():
        with Verifier() as verifier:
            num_text = check_golds(problems, verifier, seconds=None)
    path = Path(data_root) / (benchmark.file if benchmark else f"{name}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    with draft.open("wb") as target:
        target.write(content)
        target.flush()
        os.fsync(target.fileno())
    draft.replace(path)
    return Stored(benchmark.name if benchmark else f"data:{name}.jsonl", path, len(problems), num_text)
