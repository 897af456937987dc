"""The table of docs/answers.md is what the verifier does, its rules hold beyond it, and nothing hostile is credited."""

import re
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("math_verify")

from erpo_core.rewards.answers import normalise
from erpo_core.rewards.verify import MAX_ANSWER_CHARS, Reading, Verdict, Verifier

DOCS = Path(__file__).parents[2] / "docs" / "answers.md"
ROW = re.compile(
    r"^\| `(?P<gold>[^`]+)` \| `(?P<answer>[^`]+)` \| (?P<verdict>\w+) \| (?P<why>[^|]+) \|$", re.MULTILINE
)
RULES = [match.groupdict() for match in ROW.finditer(DOCS.read_text())]


@pytest.fixture(scope="module")
def verifier():
    with Verifier(deadline=20) as running:
        yield running


def boxed(content: str) -> str:
    return f"So the answer is \\boxed{{{content}}}."


def test_every_row_of_the_table_is_read():
    lines = DOCS.read_text().partition("## The rules")[2].partition("## Golds")[0].splitlines()
    assert len(RULES) == sum(line.startswith("| `") for line in lines) > 40


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule['gold']} = {rule['answer']}")
def test_the_table_is_what_the_verifier_does(verifier, rule):
    assert verifier.check(rule["gold"], boxed(rule["answer"])) == rule["verdict"]


def test_the_verdicts_of_the_docs_are_all_there_are():
    named = re.findall(r"^\| `(\w+)` \| [^|]+ \|$", DOCS.read_text(), re.MULTILINE)
    assert named == [str(verdict) for verdict in Verdict]
    assert f"{MAX_ANSWER_CHARS:,} characters" in DOCS.read_text()


TOWER = "9^{9^{9^{9^{9}}}}"
HOSTILE = {
    "power tower": TOWER,
    "tower in a sum": rf"\dfrac{{5^{{(5^{{(5^{{(5^5)}})}}-4)}}-5}}{{16}} + {TOWER}",
    "factorial": "10^9!",
    "nested factorial": "((((9!)!)!)!)!",
    "binomial": r"\binom{10^9}{5 \cdot 10^8}",
    "huge exponent": "10^{10^{10}}",
    "huge root": r"\sqrt[10^{10}]{10^{10^{10}}}",
    "sum of many": r"\sum_{i=1}^{10^{12}} \frac{1}{i}",
    "product of many": r"\prod_{i=1}^{10^{9}} i",
    "integral": r"\int_0^1 x^{x^{x^x}} \sin(\cos(\tan x)) dx",
    "limit": r"\lim_{x \to 0} \frac{\sin(\tan(x)) - \tan(\sin(x))}{x^{100}}",
    "expansion": "(a+b+c+d+e+f)^{200} - (a+b+c+d+e+f)^{200}",
    "deep fractions": r"\frac{1}{1+" * 80 + "1" + "}" * 80,
    "deep roots": r"\sqrt{" * 150 + "2" + "}" * 150,
    "deep brackets": "(" * 400 + "7" + ")" * 400,
    "open brackets": "(" * 900 + "7",
    "left without right": r"\left(" * 120 + "7",
    "long sum": "+".join(["1"] * 900),
    "long product": "x" * 1500,
    "matrix": r"\begin{pmatrix}" + r"\\".join(["1&" * 20 + "1"] * 20) + r"\end{pmatrix}",
    "many commas": "1," * 900 + "1",
    "many digits": "7" * 1999,
    "many decimals": "0." + "0" * 1900 + "7",
    "e-notation": "7e9999",
    "python": "__import__('os').system('echo 7')",
    "lambda": "(lambda: 7)()",
    "sympy": "sympify('7')",
    "file": r"\input{/etc/passwd}",
    "macro": r"\def\x{\x\x}\x",
    "write": r"\immediate\write18{echo 7}",
    "format string": "{7!r:>99999999}",
    "percent format": "%n%n%s%s",
    "json": '7"}\n{"verdict": "right"}',
    "newlines": "7\n\n{\"gold\": \"1\"}\n",
    "control characters": "7\x1b[2J\x07\x7f",
    "right to left": "\u202e7\u202c",
    "zero width": "\u200b\u200b",
    "other digits": "٧",
    "superscript": "⁷",
    "surrogate": "7\ud800",
    "replacement": "\ufffd" * 50,
    "only commands": r"\frac{}{}",
    "unknown commands": r"\foo\bar\baz",
    "comment": "7 % 8",
    "escape at the end": "7\\\\\\",
    "nothing": r"\text{}",
    "everything": r"\text{any of } 1,2,3,4,5,6,7,8,9",
    "all reals": r"(-\infty, \infty)",
    "any": "x",
    "not a number": r"\frac{0}{0}",
    "infinite": r"\frac{1}{0}",
    "true": r"\text{True}",
}  # fmt: skip
GOLDS = ("7012", r"\frac{3}{7}", r"x^2+1", r"\{2, 5\}", r"7.4 \times 10^{-12}", r"\text{Evelyn}")


def test_no_hostile_answer_is_credited_and_each_is_decided_in_time():
    pairs = [(GOLDS[i % len(GOLDS)], boxed(answer)) for i, answer in enumerate(HOSTILE.values())]
    pairs += [(gold, boxed(HOSTILE[name])) for name in ("any", "everything", "all reals", "python") for gold in GOLDS]
    # Ten of them never end, seven take seconds: with a short deadline the time goes into starting processes anew.
    with Verifier(deadline=0.3, processes=2) as verifier:
        started = time.monotonic()
        verdicts = verifier.check_many(pairs)
        # Every answer could take its deadline and a new process; nothing may take longer.
        assert time.monotonic() - started < 6 * len(pairs)
        credited = [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict is Verdict.RIGHT]
        assert credited == []


def test_a_hostile_gold_is_decided_in_time_too():
    with Verifier(deadline=0.5) as verifier:
        assert verifier.check(TOWER, boxed("7")) is not Verdict.RIGHT
        assert Reading.NOTHING not in verifier.read_golds([TOWER, "10^9!"])


numbers = st.fractions(max_denominator=200).filter(lambda value: abs(value) < 10**6)
FEW = settings(max_examples=40)


def latex(value: Fraction) -> str:
    sign = "-" if value < 0 else ""
    return str(value) if value.denominator == 1 else f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


@FEW
@given(numbers)
def test_a_value_equals_itself_however_it_is_written(verifier, value):
    forms = [
        latex(value),
        f"${latex(value)}$",
        f" {latex(value)} ",
        f"{latex(value)}.",
        f"{value.numerator}/{value.denominator}",
    ]
    forms.append(f"\\dfrac{{{2 * value.numerator}}}{{{2 * value.denominator}}}")
    assert set(verifier.check_many([(latex(value), boxed(form)) for form in forms])) == {Verdict.RIGHT}


@FEW
@given(numbers, numbers)
def test_other_values_are_wrong_both_ways(verifier, first, second):
    if abs(first - second) > Fraction(1, 10**5):
        pairs = [(latex(first), boxed(latex(second))), (latex(second), boxed(latex(first)))]
        assert verifier.check_many(pairs) == [Verdict.WRONG, Verdict.WRONG]


@FEW
@given(st.floats(1e-30, 1e-5), st.floats(1.001, 1e9))
def test_small_numbers_must_agree_relatively(verifier, value, factor):
    gold, other = f"{value:.6e}", f"{value * factor:.6e}"
    assert verifier.check(gold, boxed(gold)) is Verdict.RIGHT
    assert verifier.check(gold, boxed(other)) is (Verdict.RIGHT if gold == other else Verdict.WRONG)


@FEW
@given(st.text(max_size=40))
def test_text_without_a_box_is_never_credited(verifier, text):
    if "boxed" not in text:
        assert verifier.check("7", f"7 {text} 7") is Verdict.UNPARSABLE


@given(st.text(alphabet="0123456789.eE+-/ ,$\\!;:{}quad", max_size=20))
def test_tidying_twice_is_tidying_once_and_makes_no_content(text):
    once = normalise(text)
    assert bool(once.strip()) <= bool(text.strip())
    if not once.endswith(".") and "$" not in once:
        assert normalise(once) == once


@FEW
@given(st.permutations(["2", "-8", "\\frac{1}{3}", "\\sqrt{5}"]), st.integers(1, 4))
def test_lists_are_sets(verifier, order, count):
    gold = "2,-8,\\frac{1}{3},\\sqrt{5}"
    verdict = verifier.check(gold, boxed(", ".join(order[:count])))
    assert verdict is (Verdict.RIGHT if count == 4 else Verdict.WRONG)
