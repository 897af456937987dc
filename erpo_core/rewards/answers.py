"""The answer in a response: the content of its last balanced, non-empty \\boxed{}."""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
MAX_ANSWER_CHARS = 2000


def extract_boxed(text: str) -> str | None:
    """Content of the last balanced \\boxed{...} that is not empty, stripped; None if there is none."""
    for match in reversed(list(_BOX.finditer(text))):
        content = _balanced(text, match.end())
        if content is not None and content.strip():
            return content.strip()
    return None


def _balanced(text: str, start: int) -> str | None:
    depth, position = 1, start
    while position < len(text):
        char = text[position]
        if char == "\\":
            position += 2
            continue
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[start:position]
        position += 1
    return None
