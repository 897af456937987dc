"""Are two answers equal? Runs only inside the verifier process: math-verify can hang and takes memory."""

import math
import re
from fractions import Fraction

_THIN_SPACE = re.compile(r"\\[,;:!]|\\ |~|\u2009|\u00a0")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_GROUPED = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")
RELATIVE_TOLERANCE = 1e-6


def normalize(answer: str) -> str:
    """Without thin spaces, surrounding dollars and a final stop."""
    text = _THIN_SPACE.sub("", answer).strip().strip("$").strip()
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text


def plain_number(answer: str) -> Fraction | None:
    """The value of an integer or decimal as people write it; None for everything else."""
    text = answer.replace(",", "") if _GROUPED.fullmatch(answer) else answer
    return Fraction(text) if _NUMBER.fullmatch(text) and len(text) < 200 else None


def verdict(gold: str, answer: str) -> str:
    """``right``, ``wrong`` or ``unparsable`` (the answer means nothing)."""
    gold, answer = normalize(gold), normalize(answer)
    if not answer:
        return "unparsable"
    expected, found = plain_number(gold), plain_number(answer)
    if expected is not None and found is not None:
        return "right" if expected == found else "wrong"
    return _by_math_verify(gold, answer)


def _by_math_verify(gold: str, answer: str) -> str:
    from math_verify import parse, verify

    expected = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    found = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    if not expected or not found:
        return "right" if gold == answer else "unparsable"
    # The gold comes first: math-verify is not symmetric.
    if not verify(expected, found, timeout_seconds=None):
        return "wrong"
    return "right" if _numbers_agree(expected[0], found[0]) else "wrong"


def _numbers_agree(expected, found) -> bool:
    """math-verify rounds to six decimals, so 7.4e-12 would equal 0: numbers must agree relatively as well."""
    values = []
    for side in (expected, found):
        if not getattr(side, "is_number", False):
            return True
        try:
            values.append(complex(side.evalf()))
        except (TypeError, ValueError, OverflowError):
            return True
    gold, answer = values
    if not all(map(math.isfinite, (gold.real, gold.imag, answer.real, answer.imag))):
        return True
    # 9\% equals 9 and 0.09 by design of math-verify.
    allowed = RELATIVE_TOLERANCE * max(abs(gold), abs(answer))
    return any(abs(gold * scale - answer) <= max(allowed, 1e-300) for scale in (1, 100, 0.01)) or (
        abs(gold) > 1e-3 and abs(gold - answer) <= 1e-6
    )
