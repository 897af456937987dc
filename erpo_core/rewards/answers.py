"""Finding and tidying the final answer of a response. Standard library only."""

import re
from collections.abc import Iterator
from fractions import Fraction

# A box, an escaped character (a literal brace is no delimiter), or a brace.
_TOKENS = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_THIN_SPACE_IN_NUMBER = re.compile(r"(?<=\d)(?:\\[,!;: ]|\{,\})(?=\d)")
# Program notation: math-verify reads 4.5e33 as 4.5 times Euler's number times 33, and 3 1/2 as (3 + 1)/2.
_SCIENTIFIC = re.compile(r"(?<![\w.\\}])([+-]?(?:\d+(?:\.\d*)?|\.\d+))[eE]([+-]?\d{1,4})(?![\w.{])")
_SIDE_BY_SIDE = re.compile(r"(?<=\d)\s*\\q?quad\s*(?=[+-]?\d)")  # math-verify adds such numbers up
# Commands that only say how mathematics is set: math-verify does not read them. After a digit they stay: what follows
# is another number.
_SETTING = re.compile(
    r"(?<!\d)(?<!\d\s)\\(?:ensuremath|boldsymbol|bm|underline|emph|(?:display|text|script|scriptscript)style"
    r"|tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge|color\s*\{\w*\})(?![A-Za-z])\s*"
)
_SPACES = "\\~ \t\n"
_BOLD = re.compile(r"\*\*(.+)\*\*", re.DOTALL)
_MIXED = re.compile(r"([+-]?\d+)\s+(\d+)/(\d+)")
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[+-]?\.\d+")
_FRACTION = re.compile(r"([+-]?)(?:\\[dt]?frac\{(\d+)\}\{(\d+)\}|(\d+)/(\d+))")
_MAX_NUMBER_CHARS = 40
_AT_6_DECIMALS, _RELATIVE = Fraction(1, 2_000_000), Fraction(1, 1_000_000)


def extract_boxed(text: str) -> str | None:
    """Content of the last balanced ``\\boxed{...}``, stripped; None if there is none or it is empty. Linear time.

    Of boxes within one another the inner one counts.
    """
    span = boxed_span(text)
    return None if span is None else text[slice(*span)].strip() or None


def boxed_span(text: str) -> tuple[int, int] | None:
    """Where the content of the last balanced box starts and ends; None if there is none."""
    return max(_boxes(text), default=None)


def boxed_contents(text: str) -> list[str]:
    """Contents of the balanced boxes, stripped, in order; a box within another one is part of the outer one."""
    contents, end = [], -1
    for start, stop in sorted(_boxes(text)):
        if start > end:
            contents.append(text[start:stop].strip())
            end = stop
    return contents


def _boxes(text: str) -> Iterator[tuple[int, int]]:
    """Where the content of each balanced box starts and ends, in the order of their ends."""
    open_braces: list[int] = []  # where the content starts if the brace opens a box, otherwise -1
    for token in _TOKENS.finditer(text):
        piece = token[0]
        if piece.endswith("{") and piece != "\\{":
            open_braces.append(token.end() if len(piece) > 1 else -1)
        elif piece == "}" and open_braces:
            start = open_braces.pop()
            if start >= 0:
                yield start, token.start()


def has_answer(text: str) -> bool:
    """Is there a balanced box with something in it? The share of such responses is Fmt."""
    return extract_boxed(text) is not None


def normalise(answer: str) -> str:
    """Without dollar signs, a final stop, and the thin spaces and commands of setting that math-verify does not read.

    ``4.5e33`` becomes ``4.5 \\times 10^{33}``, ``3 1/2`` becomes ``3\\frac{1}{2}``.
    """
    answer = answer.strip().removeprefix("\\$").strip("$").strip()
    if bold := _BOLD.fullmatch(answer):
        answer = bold[1].strip()
    answer = _SETTING.sub("", answer).lstrip("~ ").rstrip(_SPACES)
    if answer.endswith(".") and not answer.endswith(".."):
        answer = answer[:-1].rstrip(_SPACES)
    if mixed := _MIXED.fullmatch(answer):
        return f"{mixed[1]}\\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    answer = _SIDE_BY_SIDE.sub(", ", _THIN_SPACE_IN_NUMBER.sub("", answer))
    return _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", answer)


def plain_number(answer: str) -> Fraction | None:
    """A plain integer, decimal (thousands commas allowed) or fraction of whole numbers; None for anything else."""
    if len(answer) > _MAX_NUMBER_CHARS or not answer.isascii():
        return None
    if _NUMBER.fullmatch(answer):
        return Fraction(answer.replace(",", ""))
    fraction = _FRACTION.fullmatch(answer)
    if fraction is None:
        return None
    sign, *digits = (part for part in fraction.groups() if part is not None)
    above, below = map(int, digits)
    return Fraction(-above if sign == "-" else above, below) if below else None


def same_number(gold: Fraction, answer: Fraction) -> bool:
    """Integers exactly; otherwise equal at 6 decimals, as math-verify has it, and to one part in a million."""
    if gold == answer:
        return True
    if gold.denominator == answer.denominator == 1:
        return False
    difference = abs(gold - answer)
    return difference <= _AT_6_DECIMALS and difference <= abs(gold) * _RELATIVE
