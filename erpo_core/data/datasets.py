"""A data set's name becomes problems.

    <benchmark>?level=L&subject=S            a name of :mod:`erpo_core.data.benchmarks`: ``amc23``, ``math500``, ...
    reasoning-gym:<task>?size=N&seed=S&...   procedural, made on the spot
    data:<file>.jsonl[?level=3-5]            a file in the data root
    ds_<32 hex digits>[?level=3-5]           an uploaded file
    organisation/name[@revision][?config=...&split=...&level=...]   a data set of the hub

Importing this module pulls in nothing heavy: the API checks a name with it before anything is queued.
"""

import json
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from erpo_core.data.benchmarks import BENCHMARKS, known_benchmarks, read_benchmark
from erpo_core.data.formats import BoxReport, Problem, our_names, read_jsonl, to_problem
from erpo_core.data.levels import check_levels, of_levels
from erpo_core.data.reasoning_tasks import check_task, load_task
from erpo_core.errors import DatasetError, SpecError, UnknownReferenceError
from erpo_core.hub import undelivered

_UPLOAD = re.compile(r"ds_[0-9a-f]{32}")
_HUB_ID = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?")
_HUB_ARGS = {"config", "split", "level"}
_FORMS = (
    f"a benchmark ({known_benchmarks()}), `reasoning-gym:<task>?size=N&seed=S`, `data:<file>.jsonl`, "
    "an uploaded data set (`ds_...`) or a hub id"
)


@dataclass(frozen=True)
class Reference:
    """A data set's name taken apart. ``source``: ``benchmark``, ``task``, ``file``, ``upload``, ``hub``."""

    source: str
    name: str
    args: dict[str, Any]


def parse_reference(ref: str, *, pointer: str = "/dataset") -> Reference:
    """Take a name apart; nothing is looked up.

    Raises:
        UnknownReferenceError: none of the forms.
        SpecError: an argument that is written wrongly.
    """
    name, _, query = ref.partition("?")
    if name.startswith("reasoning-gym:"):
        return Reference("task", name.removeprefix("reasoning-gym:"), _arguments(query, pointer))
    for source, is_meant, known in (
        ("benchmark", name in BENCHMARKS, {"level", "subject"}),
        ("file", name.startswith("data:"), {"level"}),
        ("upload", _UPLOAD.fullmatch(name), {"level"}),
        ("hub", _HUB_ID.fullmatch(name), _HUB_ARGS),
    ):
        if is_meant:
            args = _arguments(query, pointer, literal=False)
            _check_names(source, args, known, pointer)
            return Reference(source, name.removeprefix("data:"), args)
    raise UnknownReferenceError(
        f"unknown data set {ref!r}", pointer=pointer, mend=f"write {_FORMS}", code="unknown_dataset"
    )


def check_dataset(
    ref: str, data_root: Path | None, *, pointer: str = "/dataset", with_solutions: bool = False
) -> int | None:
    """Refuse a data set that no worker could load.

    Args:
        with_solutions: only problems with a worked solution count.

    Returns:
        The number of problems, or None where only the hub knows.

    Raises:
        UnknownReferenceError: no such task, file or upload.
        DatasetError: a broken file, with the line's number.
        SpecError: an argument.
    """
    found = parse_reference(ref, pointer=pointer)
    if found.source == "task":
        size = check_task(found.name, found.args, pointer=pointer)
        return len(solved([], ref, pointer=pointer)) if with_solutions else size
    problems = local_problems(ref, data_root, pointer=pointer)
    if problems is None:
        return None
    return len(solved(problems, ref, pointer=pointer) if with_solutions else problems)


def solved(problems: list[Problem], ref: str, *, pointer: str = "/dataset") -> list[Problem]:
    """Those that have a worked solution.

    Raises:
        DatasetError: none has.
    """
    found = [problem for problem in problems if problem.solution and problem.solution.strip()]
    if not found:
        raise DatasetError(
            f"{ref} has no worked solutions to learn from",
            pointer=pointer,
            mend='name a data set whose rows have a "solution", for example GSM8K or MATH',
            code="no_solutions",
        )
    return found


def local_problems(
    ref: str, data_root: Path | None, *, pointer: str = "/dataset", boxes: BoxReport | None = None
) -> list[Problem] | None:
    """The problems of a benchmark, file or upload; None of a task or a hub data set, which are made or fetched.

    Raises:
        UnknownReferenceError, DatasetError, SpecError: as :func:`check_dataset`.
    """
    found = parse_reference(ref, pointer=pointer)
    if found.source in ("task", "hub"):
        return None
    if found.source == "benchmark":
        return read_benchmark(found.name, found.args, data_root, pointer=pointer)
    problems = read_jsonl(_file(found, data_root, pointer), pointer=pointer, boxes=boxes)
    return of_levels(problems, found.args.get("level"), pointer=pointer)


def local_file(ref: str, data_root: Path | None, *, pointer: str = "/dataset") -> Path | None:
    """The file of a benchmark, file or upload that is there; None of a task or a hub data set."""
    found = parse_reference(ref, pointer=pointer)
    if found.source in ("task", "hub"):
        return None
    if found.source == "benchmark":
        return Path(data_root) / BENCHMARKS[found.name].file
    return _file(found, data_root, pointer)


def load_problems(
    ref: str,
    *,
    data_root: Path | None,
    cache_dir: Path | None = None,
    limit: int | None = None,
    seed: int | None = None,
    boxes: BoxReport | None = None,
) -> list[Problem]:
    """The problems of a data set: the first ``limit``, after shuffling by ``seed`` if one is given.

    ``boxes`` takes down what is odd in solutions that golds are read from.

    Raises:
        UnknownReferenceError, DatasetError, SpecError: as :func:`check_dataset`.
        RunError: ``dataset_unavailable``: the hub or a package cannot deliver it.
    """
    found = parse_reference(ref)
    if found.source == "task":
        problems = load_task(found.name, found.args)
    elif found.source == "hub":
        problems = load_hub(found, cache_dir, BoxReport() if boxes is None else boxes)
        problems = of_levels(problems, found.args.get("level"))
    else:
        problems = local_problems(ref, data_root, boxes=boxes)
    if seed is not None:
        random.Random(seed).shuffle(problems)
    return problems[:limit]


def _arguments(query: str, pointer: str, *, literal: bool = True) -> dict[str, Any]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        raise SpecError(
            f"{query!r} is not name=value&name=value", pointer=pointer, mend="write ?size=100&seed=1"
        ) from None
    args = {name: _literal(value) if literal else value for name, value in pairs}
    if len(args) < len(pairs):
        raise SpecError(f"an argument is given twice in {query!r}", pointer=pointer, mend="give each argument once")
    return args


def _check_names(source: str, args: dict[str, str], known: set[str], pointer: str) -> None:
    if unknown := sorted(set(args) - known):
        a_source = {
            "benchmark": "a benchmark",
            "file": "a file",
            "upload": "an uploaded data set",
            "hub": "a hub data set",
        }[source]
        raise SpecError(
            f"{a_source} takes no argument {unknown[0]!r}",
            pointer=pointer,
            mend=f"it takes {', '.join(sorted(known))}",
        )
    check_levels(args.get("level"), pointer=pointer)


def _literal(value: str) -> Any:
    """JSON where it is JSON (numbers, true, lists), otherwise the text itself."""
    try:
        return json.loads(value.lower() if value in ("True", "False") else value)
    except (ValueError, RecursionError):
        return value


def _file(found: Reference, data_root: Path | None, pointer: str) -> Path:
    if data_root is None:
        raise UnknownReferenceError("there is no data root", pointer=pointer, mend="set ERPO_DATA_ROOT")
    root = Path(data_root).resolve()
    uploads = (root / "uploads").resolve()
    if found.source == "upload":
        path = uploads / f"{found.name}.jsonl"
        allowed = path.resolve().parent == uploads
    else:
        path = (root / found.name).resolve()
        # Uploads have owners, and are reached by their id alone.
        allowed = path.is_relative_to(root) and not path.is_relative_to(uploads) and path.suffix == ".jsonl"
    if not allowed or not path.is_file():
        known = ", ".join(f"data:{name}" for name in _known_files(root)) or "none yet"
        in_root = f"files there: {known}; what was uploaded goes by its id (ds_...)"
        raise UnknownReferenceError(
            f"there is no data set {found.name!r}" + ("" if found.source == "upload" else " in the data root"),
            pointer=pointer,
            mend=in_root if found.source == "file" else "upload it first",
            code="unknown_dataset",
        )
    return path


def _known_files(root: Path, at_most: int = 20) -> list[str]:
    return sorted(path.name for path in root.glob("*.jsonl"))[:at_most] if root.is_dir() else []


def load_hub(
    found: Reference,
    cache_dir: Path | None,
    boxes: BoxReport,
    *,
    instead: str = "bring its file along, run `erpo data import FILE`, and name `data:FILE`",
) -> list[Problem]:
    """The problems of a hub data set. ``instead``: what to do where no hub is in reach.

    Rows are named by their ``id``. Where one stands in two rows (ids that count within a subset or a split), every row
    is named by its number instead: answers are stored and counted by their problem's id.

    Raises:
        RunError: ``dataset_unavailable``: the hub does not deliver it.
        DatasetError: a row without problem or answer, or no row.
    """
    try:
        from datasets import load_dataset

        name, _, revision = found.name.partition("@")
        cache = str(cache_dir / "datasets") if cache_dir else None
        split = found.args.get("split", "train")
        rows = load_dataset(name, found.args.get("config"), split=split, revision=revision or None, cache_dir=cache)
    except Exception as error:
        raise undelivered(found.name, error, code="dataset_unavailable", instead=instead) from error
    problems, numbers = [], []
    for index, raw in enumerate(rows):
        row_id = f"{found.name}/{index}"
        row = boxes.completed(our_names(raw), row_id)
        if row is not None:
            problems.append(to_problem(row, row_id, where=f"row {index}"))
            numbers.append(row_id)
    if not problems:
        raise DatasetError(f"{found.name} holds no row", pointer="/dataset", code="empty_dataset")
    if len({problem.id for problem in problems}) == len(problems):
        return problems
    return [replace(problem, id=number) for problem, number in zip(problems, numbers, strict=True)]
