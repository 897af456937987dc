"""The page of coloured tokens as one file: its own scripts and styles, with the answers it would ask for packed inside.

The scripts are those of the served page. Their imports are renamed to entries of an import map whose modules are data:
URLs, and the module that speaks to the API is replaced by one that reads what is packed.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment

_STATIC = Path(__file__).parent / "dashboard" / "static"
_IMPORT = re.compile(r'from "\./(\w+\.js)"')
_ENTRY = "tokens.js"
_INSTEAD = {"api.js": "packed_api.js"}
CSP = "default-src 'none'; script-src 'unsafe-inline' data:; style-src 'unsafe-inline'; img-src data:"


def standalone_page(templates: Environment, run_id: str, answers: dict[str, Any]) -> str:
    """HTML that opens without a service.

    Args:
        answers: what the API says, by path and query.
    """
    icon = base64.b64encode((_STATIC / "icon.svg").read_bytes()).decode()
    return templates.get_template("tokens.html").render(
        title="Entropy",
        run_id=run_id,
        source="analysis",
        standalone={
            "csp": CSP,
            "icon": f"data:image/svg+xml;base64,{icon}",
            "style": (_STATIC / "style.css").read_text(),
            "import_map": json.dumps({"imports": _modules(_ENTRY)}),
            "entry": f"erpo/{_ENTRY}",
            "answers": _script_json(answers),
        },
    )


def _modules(entry: str) -> dict[str, str]:
    """Every module that ``entry`` reaches, by the name it is imported by, as a data: URL."""
    found: dict[str, str] = {}
    waiting = [entry, "theme.js"]
    while waiting:
        name = waiting.pop()
        if f"erpo/{name}" in found:
            continue
        text = (_STATIC / _INSTEAD.get(name, name)).read_text()
        waiting += _IMPORT.findall(text)
        code = _IMPORT.sub(r'from "erpo/\1"', text).encode()
        found[f"erpo/{name}"] = "data:text/javascript;base64," + base64.b64encode(code).decode()
    return found


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever a model wrote."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
