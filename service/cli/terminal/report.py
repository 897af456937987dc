"""The demo's tables and what may honestly be said about them."""

from typing import Any

from rich.table import Table

_ROWS = (("Acc", "acc", True), ("Fmt", "fmt", True), ("Mean length", "mean_length", False))


def comparison(base: dict[str, Any], trained: dict[str, Any]) -> Table:
    """Base against ERPO; arguments are the ``result`` of two evaluations of the same problems."""
    table = Table(title=_title(base), title_justify="left", title_style="bold", header_style="bold")
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column("ERPO", justify="right")
    table.add_column("difference", justify="right")
    for label, name, is_share in _ROWS:
        a, b = _interval(base.get(name)), _interval(trained.get(name))
        table.add_row(label, _shown(a, is_share), _shown(b, is_share), _difference(a, b, is_share))
    return table


def wording(base: dict[str, Any], trained: dict[str, Any]) -> str:
    """One sentence: which way accuracy went, and whether chance could have done it."""
    a, b = _interval(base.get("acc")), _interval(trained.get("acc"))
    if a is None or b is None or a["value"] is None or b["value"] is None:
        return "No accuracy was measured."
    change = 100 * (b["value"] - a["value"])
    if abs(change) < 0.05:
        told = "Accuracy is the same as before."
    else:
        told = f"Accuracy {'rose' if change > 0 else 'fell'} by {abs(change):.1f} points"
        apart = None not in (a["low"], b["low"]) and (b["low"] > a["high"] or b["high"] < a["low"])
        told += (
            "; the 95% intervals do not overlap."
            if apart
            else "; the 95% intervals overlap, so that chance may have had a part in it."
        )
    return told + " One seed and a very short training: an illustration, not a result about ERPO."


def _title(result: dict[str, Any]) -> str:
    problems, samples = result.get("num_problems"), result.get("num_samples")
    if problems is None:
        return "Held-out problems"
    return f"{problems} held-out problems, {samples} answer{'s' if samples != 1 else ''} each (95% intervals)"


def _interval(value: Any) -> dict[str, float | None] | None:
    if value is None:
        return None
    if isinstance(value, dict):
        return {"value": value.get("value"), "low": value.get("low"), "high": value.get("high")}
    return {"value": float(value), "low": None, "high": None}


def _shown(value: dict[str, float | None] | None, is_share: bool) -> str:
    if value is None or value["value"] is None:
        return "–"
    text = f"{_number(value['value'], is_share)}{'%' if is_share else ''}"
    if value["low"] is not None and value["high"] is not None:
        text += f"  [{_number(value['low'], is_share)}, {_number(value['high'], is_share)}]"
    return text


def _difference(a, b, is_share: bool) -> str:
    if not a or not b or a["value"] is None or b["value"] is None:
        return "–"
    change = b["value"] - a["value"]
    return f"{100 * change:+.1f} points" if is_share else f"{change:+.1f} tokens"


def _number(value: float, is_share: bool) -> str:
    return f"{100 * value:.1f}" if is_share else f"{value:.1f}"
