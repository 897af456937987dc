"""Finding and tidying the final answer of a response. Standard library only."""

import re
from decimal import Decimal

# A box, an escaped character (a literal brace is no delimiter), or a brace.
_TOKENS = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_THIN_SPACE_IN_NUMBER = re.compile(r"(?<=\d)(?:\\[,!;: ]|\{,\})(?=\d)")
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[+-]?\.\d+")
_MAX_NUMBER_CHARS = 40


def extract_boxed(text: str) -> str | None:
    """Content of the last balanced ``\\boxed{...}``, stripped; None if there is none or it is empty. Linear time.

    Of boxes within one another the inner one counts.
    """
    span = boxed_span(text)
    return None if span is None else text[slice(*span)].strip() or None


def boxed_span(text: str) -> tuple[int, int] | None:
    """Where the content of the last balanced box starts and ends; None if there is none."""
    open_braces: list[int] = []  # where the content starts if the brace opens a box, otherwise -1
    last = (-1, -1)
    for token in _TOKENS.finditer(text):
        piece = token[0]
        if piece.endswith("{") and piece != "\\{":
            open_braces.append(token.end() if len(piece) > 1 else -1)
        elif piece == "}" and open_braces:
            start = open_braces.pop()
            if start > last[0]:
                last = (start, token.start())
    return last if last[0] >= 0 else None


def has_answer(text: str) -> bool:
    """Is there a balanced box with something in it? The share of such responses is Fmt."""
    return extract_boxed(text) is not None


def normalise(answer: str) -> str:
    """Without dollar signs, a final stop, and the thin spaces in numbers that math-verify does not read."""
    answer = answer.strip().strip("$").strip()
    if answer.endswith(".") and not answer.endswith(".."):
        answer = answer[:-1].rstrip()
    return _THIN_SPACE_IN_NUMBER.sub("", answer)


def plain_number(answer: str) -> Decimal | None:
    """A plain integer or decimal, thousands commas allowed; None for anything else."""
    if len(answer) > _MAX_NUMBER_CHARS or not answer.isascii() or not _NUMBER.fullmatch(answer):
        return None
    return Decimal(answer.replace(",", ""))


def same_number(gold: Decimal, answer: Decimal) -> bool:
    """Integers exactly; otherwise equal at 6 decimals, as math-verify has it, and to one part in a million."""
    if gold == answer:
        return True
    if gold == gold.to_integral_value() and answer == answer.to_integral_value():
        return False
    difference = abs(gold - answer)
    return difference <= Decimal("5e-7") and difference <= abs(gold) * Decimal("1e-6")
