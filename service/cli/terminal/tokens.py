"""Model text, token by token, on a coloured ground. Nothing a model wrote can reach the terminal as a command."""

import unicodedata
from collections.abc import Sequence

from rich.style import Style
from rich.text import Text

from service.cli.terminal.colours import heat, ink, nice_domain


def visible(text: str) -> str:
    """The text with line breaks marked and every control or formatting character made visible.

    A model may write escape sequences or right-to-left overrides: they become pictures, never commands.
    """
    return "".join(_visible_character(c) for c in text)


def _visible_character(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character == "\t":
        return "⇥   "
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    return "·" if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") else character


def token_text(
    tokens: Sequence[str],
    entropies: Sequence[float | None],
    pivots: Sequence[int] = (),
    *,
    high: float | None = None,
) -> Text:
    """The answer coloured by entropy; pivots are underlined and bold.

    Tokens without text of their own (the later parts of a character that several tokens form) lend their entropy to
    the cell before them, whose colour is that of its highest.
    """
    top = high or nice_domain([h for h in entropies if h is not None])
    marked = set(pivots)
    out = Text()
    for text, entropy, is_pivot in _cells(tokens, entropies, marked):
        ground = heat(entropy, top)
        style = Style(color=_rgb(ink(ground)), bgcolor=_rgb(ground), underline=is_pivot, bold=is_pivot)
        # The ground ends before a line break: otherwise terminals paint the rest of the line.
        for index, piece in enumerate(visible(text).split("\n")):
            if index:
                out.append("\n")
            if piece:
                out.append(piece, style)
    return out


def legend(high: float, *, width: int = 24) -> Text:
    """The scale from 0 to ``high`` nats, and what underlining means."""
    out = Text("0 ")
    for index in range(width):
        out.append(" ", Style(bgcolor=_rgb(heat(index / (width - 1), 1.0))))
    out.append(f" ≥ {high:g} nats   ")
    out.append("underlined", Style(underline=True, bold=True))
    out.append(" = Critical Decision Pivot")
    return out


def _cells(tokens, entropies, marked):
    cells: list[tuple[str, float | None, bool]] = []
    for position, (token, entropy) in enumerate(zip(tokens, entropies, strict=True)):
        is_pivot = position in marked
        if token == "" and cells:
            text, highest, was_pivot = cells[-1]
            known = [h for h in (highest, entropy) if h is not None]
            cells[-1] = (text, max(known, default=None), was_pivot or is_pivot)
        else:
            cells.append((token, entropy, is_pivot))
    return cells


def _rgb(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
