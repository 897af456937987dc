"""One rule for content negotiation: a page is served only where Accept names it."""

from fastapi import Request


def accepts(request: Request, media_type: str) -> bool:
    """Whether Accept names ``media_type`` itself with a quality above 0; wildcards do not count."""
    for part in request.headers.get("accept", "").lower().split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        if name == media_type:
            return not any(p.startswith("q=") and _quality(p[2:]) == 0 for p in parameters)
    return False


def wants_html(request: Request) -> bool:
    """True only if Accept names ``text/html``; ``*/*`` is JSON. Responses that depend on it send ``Vary: Accept``."""
    return accepts(request, "text/html")


def _quality(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 1.0
