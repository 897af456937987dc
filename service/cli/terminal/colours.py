"""The yellow-to-red scale of entropy, and text on it that can be read. ``colour.js`` draws the same in the page."""

YL_OR_RD = ("#ffffcc", "#ffeda0", "#fed976", "#feb24c", "#fd8d3c", "#fc4e2a", "#e31a1c", "#bd0026", "#800026")
"""ColorBrewer's YlOrRd with nine classes: lightness falls all along, so that it also reads in grey."""

RGB = tuple[int, int, int]
_STOPS: tuple[RGB, ...] = tuple((int(c[1:3], 16), int(c[3:5], 16), int(c[5:7], 16)) for c in YL_OR_RD)


def heat(value: float | None, high: float, low: float = 0.0) -> RGB:
    """Colour of a value on the fixed domain ``low`` to ``high``; outside it is clamped, unknown is light grey."""
    if value is None or value != value:
        return (222, 222, 222)
    share = min(1.0, max(0.0, (value - low) / (high - low))) * (len(_STOPS) - 1)
    index = min(int(share), len(_STOPS) - 2)
    rest = share - index
    red, green, blue = (round(a + (b - a) * rest) for a, b in zip(_STOPS[index], _STOPS[index + 1], strict=True))
    return (red, green, blue)


def luminance(colour: RGB) -> float:
    """Relative luminance of WCAG 2, 0 (black) to 1 (white)."""
    parts = [c / 255 for c in colour]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: RGB, b: RGB) -> float:
    """Contrast ratio of WCAG 2, 1 to 21."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def ink(background: RGB) -> RGB:
    """Black or white, whichever reads better: the ratio is never below 4.58."""
    black, white = (0, 0, 0), (255, 255, 255)
    return black if contrast(black, background) >= contrast(white, background) else white


def nice_domain(values: list[float]) -> float:
    """Upper end of a scale in nats: the first of 0.5, 1, 2, 3, 5, 8 and 12 that holds 99% of the values."""
    finite = sorted(v for v in values if v == v)
    peak = finite[min(len(finite) - 1, int(0.99 * len(finite)))] if finite else 0.0
    return next((top for top in (0.5, 1.0, 2.0, 3.0, 5.0, 8.0) if peak <= top), 12.0)
