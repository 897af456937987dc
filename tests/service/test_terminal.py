"""What the command line draws."""

import io
import re

import pytest
from rich.console import Console

from service.cli.terminal.colours import YL_OR_RD, contrast, heat, ink, luminance, nice_domain
from service.cli.terminal.curves import curve
from service.cli.terminal.progress import facts, job_progress
from service.cli.terminal.report import comparison, wording
from service.cli.terminal.tokens import legend, token_text, visible

SGR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def printed(renderable, width: int = 80, **options) -> str:
    console = Console(file=io.StringIO(), color_system="truecolor", width=width, highlight=False, **options)
    console.print(renderable)
    return console.file.getvalue()


def test_the_scale_is_that_of_the_page_and_falls_in_lightness():
    assert [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in (heat(i / 8, 1.0) for i in range(9))] == list(YL_OR_RD)
    lights = [luminance(heat(i / 200, 1.0)) for i in range(201)]
    assert lights == sorted(lights, reverse=True)


def test_text_is_readable_on_every_colour():
    assert min(contrast(ink(heat(i / 500, 1.0)), heat(i / 500, 1.0)) for i in range(501)) >= 4.5


def test_values_outside_the_domain_are_clamped():
    assert heat(99.0, 2.0) == heat(2.0, 2.0)
    assert heat(-1.0, 2.0) == heat(0.0, 2.0)
    assert heat(None, 2.0) == heat(float("nan"), 2.0)


def test_tokens_are_coloured_even_where_the_output_is_no_terminal():
    text = printed(token_text([" a", "b"], [0.0, 2.0], high=2.0), force_terminal=False)
    assert "48;2;255;255;204" in text
    assert "48;2;128;0;38" in text


def test_pivots_and_only_pivots_are_underlined():
    text = token_text(["one", " two", " three"], [0.1, 1.9, 0.2], [1], high=2.0)
    assert [text.plain[span.start : span.end] for span in text.spans if span.style.underline] == [" two"]


def test_escape_sequences_of_a_model_are_pictures():
    out = printed(token_text(["\x1b[2J", "\x1b]0;title\x07", "a\u202eb", "\x9b31m"], [0.1] * 4, high=1.0))
    left = SGR.sub("", out)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", left)
    assert "␛[2J" in left


def test_breaks_are_marked_and_made():
    assert visible("a\n\tb") == "a↵\n⇥   b"
    assert token_text(["a\n", "b"], [0.1, 0.2], high=1.0).plain == "a↵\nb"


def test_tokens_of_one_character_share_its_cell_with_the_highest_entropy():
    text = token_text(["é", "", "x"], [0.0, 2.0, 0.0], [1], high=2.0)
    assert text.plain == "éx"
    assert text.spans[0].style.bgcolor.triplet.hex == YL_OR_RD[-1]
    assert text.spans[0].style.underline


def test_the_legend_names_the_end_of_the_scale_and_the_pivots():
    assert "≥ 2 nats" in legend(2.0).plain
    assert "Critical Decision Pivot" in legend(2.0).plain


@pytest.mark.parametrize(("values", "top"), [([], 0.5), ([0.1, 0.3], 0.5), ([0.2, 1.7], 2.0), ([11.0], 12.0)])
def test_the_domain_is_a_round_number_that_holds_the_values(values, top):
    assert nice_domain(values) == top


def test_a_rising_curve_starts_low_and_ends_high():
    lines = curve(list(range(10)), [i / 9 for i in range(10)], title="reward", width=20, height=4, style="green")
    rows = [line.split("│")[1] for line in lines.plain.splitlines() if "│" in line]
    assert len(rows) == 4
    assert all(len(row) == 20 for row in rows)
    assert rows[-1][0] != "⠀"
    assert rows[0][-1] != "⠀"
    assert rows[0][0] == rows[-1][-1] == "⠀"


@pytest.mark.parametrize("values", [[], [None, None], [0.5], [0.3, 0.3, 0.3], [1.0, None, 2.0]])
def test_curves_take_any_values(values):
    assert curve(list(range(len(values))), values, title="reward", style="green").plain.startswith("reward")


def test_progress_outside_a_terminal_is_one_line_a_step():
    console = Console(file=io.StringIO(), force_terminal=False, width=120)
    with job_progress(console, "ERPO") as take:
        for done in (1, 1, 2):
            data = {
                "phase": "train",
                "done": done,
                "total": 2,
                "reward": 0.5,
                "entropy": 0.25,
                "tokens_per_second": 99.6,
            }
            take({"type": "progress", "data": {**data, "eta_seconds": 61}})
        take({"type": "log.line", "data": {}})
    assert console.file.getvalue().splitlines() == [
        f"  ERPO: training {done}/2  reward 0.50 · entropy 0.250 · 100 tokens/s · 1:01 left" for done in (1, 2)
    ]


def test_progress_in_a_terminal_ends_full():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with job_progress(console, "ERPO") as take:
        take({"type": "progress", "data": {"phase": "train", "done": 3, "total": 4, "eta_seconds": 5}})
        take({"type": "job.status", "data": {"from": "running", "to": "succeeded"}})
    assert "4/4" in SGR.sub("", console.file.getvalue()).splitlines()[-1]


def test_unknown_facts_are_left_out():
    assert facts({"phase": "load", "reward": None}) == ""


def _result(acc: float, low: float, high: float) -> dict:
    return {
        "acc": {"value": acc, "low": low, "high": high},
        "fmt": {"value": 1.0, "low": 0.9, "high": 1.0},
        "mean_length": {"value": 21.5, "low": 20.0, "high": 23.0},
        "num_problems": 64,
        "num_samples": 2,
    }


def test_the_table_shows_both_models_with_intervals():
    text = SGR.sub("", printed(comparison(_result(0.25, 0.2, 0.3), _result(0.5, 0.4, 0.6)), width=110))
    assert "25.0%  [20.0, 30.0]" in text
    assert "50.0%  [40.0, 60.0]" in text
    assert "+25.0 points" in text
    assert "64 held-out problems, 2 answers each" in text


def test_the_wording_follows_the_numbers():
    base = _result(0.25, 0.2, 0.3)
    assert "rose by 25.0 points; the 95% intervals do not overlap" in wording(base, _result(0.5, 0.4, 0.6))
    assert "rose by 5.0 points; the 95% intervals overlap" in wording(base, _result(0.3, 0.2, 0.4))
    assert "fell by 10.0 points" in wording(base, _result(0.15, 0.1, 0.21))
    assert "the same as before" in wording(base, base)
    assert "No accuracy" in wording({}, {})
