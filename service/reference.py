"""The page ``/docs``: plain HTML made from the OpenAPI document. No script, nothing from another host."""

from html import escape
from typing import Any

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1d2330;background:#fff}
code,.path{font-family:ui-monospace,monospace;font-size:.92em}h2{margin-top:2.5rem}
details{border:1px solid #d9dde5;border-radius:6px;margin:.4rem 0;padding:.4rem .8rem}summary{cursor:pointer}
.verb{display:inline-block;width:4.5rem;font-weight:600}td,th{text-align:left;padding:.15rem .8rem .15rem 0;
vertical-align:top}table{border-collapse:collapse;width:100%}th{color:#5c6575;font-weight:500}
@media (prefers-color-scheme:dark){body{background:#14171d;color:#dfe3ea}details{border-color:#333a46}}
"""


def docs_html(document: dict[str, Any]) -> str:
    """The whole page."""
    schemas = document["components"]["schemas"]
    groups: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for verb, operation in operations.items():
            tag = (operation.get("tags") or ["other"])[0]
            groups.setdefault(tag, []).append(_operation(verb, path, operation, schemas))
    body = "".join(f"<h2>{escape(tag)}</h2>{''.join(items)}" for tag, items in groups.items())
    intro = "".join(
        f"<p>{escape(line)}</p>" for line in document["info"].get("description", "").strip().splitlines() if line
    )
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>ERPO Lab API</title>"
        "<meta name='viewport' content='width=device-width'><link rel='stylesheet' href='/docs/style.css'>"
        f"<h1>ERPO Lab API</h1>{intro}<p>For programs: <a href='/openapi.json'>/openapi.json</a>.</p>{body}</html>"
    )


def docs_style() -> str:
    """Its style sheet."""
    return _STYLE


def _operation(verb: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    rows = [
        _row(
            item["name"],
            f"{item['in']}, {_type(item['schema'])}",
            item.get("description") or item["schema"].get("description"),
        )
        for item in operation.get("parameters", [])
    ]
    tables = _table("Parameters", rows)
    for name in _body_schemas(operation):
        tables += _table(name, _fields(schemas.get(name, {})))
    return (
        f"<details><summary><span class='verb'>{verb.upper()}</span> <span class='path'>{escape(path)}</span></summary>"
        f"<p>{escape(operation.get('description', ''))}</p>{tables}</details>"
    )


def _body_schemas(operation: dict[str, Any]) -> list[str]:
    contents = operation.get("requestBody", {}).get("content", {}).values()
    return [name for content in contents for name in _references(content.get("schema", {}))]


def _references(schema: dict[str, Any]) -> list[str]:
    found = [schema["$ref"].rsplit("/", 1)[-1]] if "$ref" in schema else []
    for key in ("oneOf", "anyOf"):
        found += [name for option in schema.get(key, []) for name in _references(option)]
    return found


def _fields(schema: dict[str, Any]) -> list[str]:
    required = set(schema.get("required", ()))
    rows = []
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in required else f"default {field.get('default')!r}"
        rows.append(_row(name, f"{_type(field)}, {default}", field.get("description")))
    return rows


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return schema["$ref"].rsplit("/", 1)[-1]
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return " or ".join(_type(option) for option in schema[key])
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    if schema.get("type") == "array" and isinstance(schema.get("items"), dict):
        return f"list of {_type(schema['items'])}"
    return str(schema.get("type") or schema.get("const") or "any")


def _row(name: str, kind: str, description: str | None) -> str:
    return f"<tr><td><code>{escape(name)}</code></td><td>{escape(kind)}</td><td>{escape(description or '')}</td></tr>"


def _table(title: str, rows: list[str]) -> str:
    return f"<h4>{escape(title)}</h4><table>{''.join(rows)}</table>" if rows else ""
