"""What a usable row is. Light: the API checks an uploaded file with the same code that the worker loads it with."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from erpo_core.errors import DatasetError
from erpo_core.rewards.answers import boxed_contents, extract_boxed, normalise

_ROW_MEND = 'write one JSON object a line, for example {"problem": "What is 2 + 2?", "answer": "4"}'
MAX_LINE_CHARS = 1_000_000
_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Problem:
    """One problem. ``answer`` is what belongs inside ``\\boxed{}``: LaTeX without dollar signs."""

    id: str
    problem: str
    answer: str
    solution: str | None = None
    level: str | int | None = None
    subject: str | None = None


@dataclass
class BoxReport:
    """Ids of rows that have no ``answer`` of their own and whose solution is odd; the gold is its last box.

    Rows with no box or an empty one are left out; of ``several``, different boxes in one solution, the last counts.
    """

    none: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    several: list[str] = field(default_factory=list)

    def completed(self, row: dict[str, Any], row_id: str) -> dict[str, Any] | None:
        """The row with its gold; None where that should be in the solution and is not."""
        solution = row.get("solution")
        if "answer" in row or not isinstance(solution, str):
            return row
        boxes, gold = boxed_contents(solution), extract_boxed(solution)
        if gold is None or not is_answer(clean_answer(gold)):
            (self.empty if boxes else self.none).append(row_id)
            return None
        if len({normalise(box) for box in boxes}) > 1:
            self.several.append(row_id)
        return {**row, "answer": gold}


def read_jsonl(
    path: Path, *, pointer: str = "/dataset", limit: int | None = None, boxes: BoxReport | None = None
) -> list[Problem]:
    """The problems of a JSON Lines file, in the file's order; every row is checked even beyond ``limit``.

    Raises:
        DatasetError: a broken line (named by its number), a problem twice, no row at all.
    """
    with path.open("rb") as file:
        problems = list(parse_lines(file, path.stem, pointer=pointer, boxes=boxes))
    if not problems:
        raise DatasetError(f"{path.name} holds no problem", pointer=pointer, mend=_ROW_MEND, code="empty_dataset")
    return problems[:limit]


def parse_lines(
    lines: Iterable[bytes], name: str, *, pointer: str = "/dataset", boxes: BoxReport | None = None
) -> Iterator[Problem]:
    """Problems of JSON Lines; blank lines are skipped, ``name`` and the line's number make the default id.

    Raises:
        DatasetError: naming the line.
    """
    boxes = BoxReport() if boxes is None else boxes
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where, default_id = f"line {number}", f"{name}/{number}"
        row = boxes.completed(our_names(_parse_line(line, where, pointer)), default_id)
        if row is None:
            continue
        problem = to_problem(row, default_id, where=where, pointer=pointer)
        if problem.id in seen:
            first = seen[problem.id]
            raise DatasetError(
                f"line {number}: the id {problem.id!r} stands in line {first} already",
                pointer=pointer,
                mend="give every row an id of its own, or none",
            )
        seen[problem.id] = number
        yield problem


def _parse_line(line: bytes, where: str, pointer: str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig")
        if len(text) > MAX_LINE_CHARS:
            raise ValueError(f"longer than {MAX_LINE_CHARS} characters")
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{where} is not JSON: {error}", pointer=pointer, mend=_ROW_MEND) from None
    if not isinstance(row, dict):
        raise DatasetError(f"{where} is a JSON {type(row).__name__}, not an object", pointer=pointer, mend=_ROW_MEND)
    return row


def our_names(row: dict[str, Any]) -> dict[str, Any]:
    """A row of GSM8K or MATH as published under our names: ``question`` is a problem, ``type`` a subject, and
    ``#### 7`` ends a solution."""
    row = {key: value for key, value in row.items() if value is not None}
    for ours, theirs in (("problem", "question"), ("subject", "type")):
        if theirs in row:
            row.setdefault(ours, row[theirs])
    answer = row.get("answer")
    if isinstance(answer, str) and "####" in answer:
        solution, _, gold = answer.rpartition("####")
        row["solution"] = _CALCULATOR_MARK.sub("", solution).strip()
        row["answer"] = gold.strip().replace(",", "")
    return row


def to_problem(row: dict[str, Any], default_id: str, *, where: str, pointer: str = "/dataset") -> Problem:
    """A row as a problem. Keys: ``problem``, ``answer``; ``id``, ``solution``, ``level``, ``subject`` if known.

    Raises:
        DatasetError: ``problem`` or ``answer`` is absent, empty, not text (a number is fine as an answer), or the
            answer holds nothing that could be compared.
    """
    problem = _text(row, "problem", where, pointer)
    answer = clean_answer(_text(row, "answer", where, pointer, numbers=True))
    if not is_answer(answer):
        raise DatasetError(
            f"{where}: the answer {answer!r} has no content to compare with",
            pointer=pointer,
            mend="write the final answer as it belongs inside \\boxed{}",
        )
    level, subject, solution = row.get("level"), row.get("subject"), row.get("solution")
    return Problem(
        id=str(row["id"])[:200] if row.get("id") not in (None, "") else default_id,
        problem=problem,
        answer=answer,
        solution=solution if isinstance(solution, str) else None,
        level=_level(level),
        subject=subject if isinstance(subject, str) else None,
    )


def _text(row: dict[str, Any], key: str, where: str, pointer: str, *, numbers: bool = False) -> str:
    value = row.get(key)
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        value = repr(value)
    if not isinstance(value, str) or not value.strip():
        found = "is absent" if key not in row else "is empty" if value in ("", None) else f"is {str(value)[:40]!r}"
        raise DatasetError(f"{where}: {key!r} {found}", pointer=pointer, mend=_ROW_MEND)
    if "\0" in value:
        raise DatasetError(f"{where}: {key!r} holds a NUL character", pointer=pointer, mend="remove it")
    return value


def _level(value: Any) -> str | int | None:
    """``Level 5`` is 5."""
    if isinstance(value, str):
        number = value.lower().removeprefix("level").strip()
        return int(number) if number.isdecimal() else value
    return value if isinstance(value, int) else None


def clean_answer(answer: str) -> str:
    """The answer without the dollar signs that some files put around it."""
    answer = answer.strip()
    if len(answer) > 1 and answer.startswith("$") and answer.endswith("$"):
        answer = answer.strip("$").strip()
    return answer


def is_answer(answer: str) -> bool:
    """Has it anything but LaTeX spacing, braces and punctuation? ``\\infty`` has, ``\\, {}`` and ``?`` have not."""
    bare = answer
    for spacing in ("\\left", "\\right", "\\quad", "\\text", "\\boxed", "\\mathrm", "\\displaystyle"):
        bare = bare.replace(spacing, "")
    return any(char.isalnum() for char in bare) or bare.strip() in ("+", "-", "*", "/", "<", ">", "=")


def problems_digest(problems: Iterable[Any]) -> str:
    """sha256 over the content and order of problems, which are dataclasses of any kind."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps(asdict(problem), sort_keys=True).encode())
    return digest.hexdigest()
