"""Pydantic's errors as ``{pointer, code, message, mend}``: where in the body, what is wrong, what to write instead."""

import re
from difflib import get_close_matches
from functools import cache
from typing import Any

from erpo_core.specs.common import Spec
from erpo_core.specs.train import TRAIN_SPECS

_TYPE_MENDS = {
    "int": "write an integer",
    "float": "write a number",
    "finite": "write a finite number",
    "bool": "write true or false",
    "string_type": "write a string",
    "string_unicode": "write valid Unicode: no lone surrogates",
    "datetime": "write a time, for example 2026-01-31T12:00:00Z",
    "timezone": "add the zone, for example 2026-01-31T12:00:00Z",
    "list": "write a list",
    "tuple": "write a list",
    "dict": "write an object",
    "model": "write an object",
    "json": "send valid JSON",
    "none": "write null",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "write a value of at least {}"),
    "greater_than": ("gt", "write a value above {}"),
    "less_than_equal": ("le", "write a value of at most {}"),
    "less_than": ("lt", "write a value below {}"),
    "string_too_short": ("min_length", "write at least {} characters"),
    "string_too_long": ("max_length", "write at most {} characters"),
    "too_short": ("min_length", "give at least {} items"),
    "too_long": ("max_length", "give at most {} items"),
    "literal_error": ("expected", "write one of {}"),
    "enum": ("expected", "write one of {}"),
    "union_tag_invalid": ("expected_tags", "write one of {}"),
    "string_pattern_mismatch": ("pattern", "write a text that matches {}"),
}
_FIELD_MESSAGE = re.compile(r"^(?:Value error, )?([A-Za-z_][\w./]*): (.+)$", re.DOTALL)
_MAX_ERRORS = 50


def describe_errors(errors: list[dict[str, Any]], body: Any) -> list[dict[str, str]]:
    """One entry per place of the body, in the order pydantic found them, at most 50.

    The branches of a union report the same place several times: they are joined, and a branch that only says "this
    is not a string" about an object is dropped when another branch looked inside the object; so is a list's "too short"
    when an item of it is wrong, for pydantic counts only the good ones.
    """
    items = [_describe(error, body) for error in errors]
    pointers = [item["pointer"] for item in items]
    joined: dict[str, dict[str, str]] = {}
    for item in items:
        inside = item["pointer"] + "/"
        if item["code"] in ("string_type", "too_short") and any(pointer.startswith(inside) for pointer in pointers):
            continue
        first = joined.setdefault(item["pointer"], item)
        if first is not item and item["mend"] not in first["mend"]:
            first["message"] += f"; or: {item['message']}"
            first["mend"] += f", or {item['mend']}"
    return list(joined.values())[:_MAX_ERRORS]


def json_pointer(parts: list[str | int]) -> str:
    """RFC 6901."""
    return "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in parts)


def _describe(error: dict[str, Any], body: Any) -> dict[str, str]:
    where, *location = error.get("loc") or ("body",)
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    parts = _place(location, body, kind) if where == "body" else [where, *location]
    if kind.startswith("union_tag"):
        # The tag is read by a function, so pydantic names no field; the only one that tells specs apart is this.
        parts, message = [*parts, "algorithm"], "there is no such algorithm"
    if kind == "value_error":
        field, message, mend = _split_value_error(message)
        parts += field
    elif kind == "json_invalid":
        reason = error.get("ctx", {}).get("error", "it cannot be read")
        message, mend = f"not JSON: {reason}{_line_of(location, body)}", _TYPE_MENDS["json"]
    else:
        mend = _mend(error, parts, body)
    return {"pointer": json_pointer(parts), "code": kind, "message": message, "mend": mend}


def _line_of(location: list[str | int], body: Any) -> str:
    """Where in the text of the body a JSON reader stopped."""
    if not (isinstance(body, str) and location and isinstance(location[0], int)):
        return ""
    before = body[: location[0]]
    return f" (line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))})"


def _place(location: list[str | int], body: Any, kind: str) -> list[str | int]:
    """The part of pydantic's location that exists in the body: names of union branches are left out."""
    parts: list[str | int] = []
    here = body
    for index, name in enumerate(location):
        is_last = index == len(location) - 1
        if (isinstance(here, dict) and name in here) or (
            isinstance(here, list | tuple) and isinstance(name, int) and 0 <= name < len(here)
        ):
            here = here[name]
            parts.append(name)
        elif is_last and kind == "missing":
            parts.append(name)
    return parts


def _split_value_error(message: str) -> tuple[list[str], str, str]:
    """``field: text; mend`` of a model validator as field path, message and mend."""
    match = _FIELD_MESSAGE.match(message)
    field, text = (re.split(r"[./]", match[1]), match[2]) if match else ([], message)
    fact, separator, mend = text.rpartition("; ")
    return field, fact if separator else text, mend if separator else text


def _mend(error: dict[str, Any], parts: list[str | int], body: Any) -> str:
    kind, context = error["type"], error.get("ctx") or {}
    name = str(parts[-1]) if parts else "the body"
    if kind == "missing":
        return f"add `{name}`" if parts else "send a JSON object as the body"
    if kind == "extra_forbidden":
        return _unknown_field(name, body)
    if kind in _BOUNDS:
        key, text = _BOUNDS[kind]
        return text.format(context.get(key, "the documented values"))
    return next((text for start, text in _TYPE_MENDS.items() if kind.startswith(start)), "see the schema at /docs")


def _unknown_field(name: str, body: Any) -> str:
    owners = [f"`{algorithm}`" for algorithm, spec in TRAIN_SPECS.items() if name in spec.model_fields]
    algorithm = body.get("algorithm", "erpo") if isinstance(body, dict) else None
    if owners and isinstance(algorithm, str) and f"`{algorithm}`" not in owners:
        return f"remove `{name}`: it belongs to algorithm {' and '.join(owners)}"
    close = [match for match in get_close_matches(name, _field_names(), n=1, cutoff=0.7) if match != name]
    return f"write `{close[0]}`, or remove `{name}`" if close else f"remove `{name}`"


@cache
def _field_names() -> tuple[str, ...]:
    names: set[str] = set()
    classes = [Spec]
    while classes:
        cls = classes.pop()
        classes += cls.__subclasses__()
        names |= set(cls.model_fields)
    return tuple(sorted(names))
