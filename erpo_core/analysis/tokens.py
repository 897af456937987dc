"""What a token looks like on a page: byte-level tokens can be parts of one character."""

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"
_MAX_PARTS = 12


def display_tokens(tokenizer, token_ids: Sequence[int]) -> list[str]:
    """One text per token; together they are the decoded sequence."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return display_parts(len(token_ids), lambda start, end: tokenizer.decode(list(token_ids[start:end]), **options))


def display_parts(count: int, decode: Callable[[int, int], str]) -> list[str]:
    """One text for each of ``count`` tokens; ``decode(start, end)`` is the text of some of them together.

    Where several tokens form one character the first carries it and the others are empty. What never becomes valid
    UTF-8 stays the replacement character.
    """
    texts: list[str] = []
    while len(texts) < count:
        length, text = _shortest_whole(len(texts), count, decode)
        texts += [text] + [""] * (length - 1)
    return texts


def _shortest_whole(start: int, count: int, decode: Callable[[int, int], str]) -> tuple[int, str]:
    single = decode(start, start + 1)
    if _BROKEN not in single:
        return 1, single
    for end in range(start + 2, min(start + _MAX_PARTS, count) + 1):
        text = decode(start, end)
        if _BROKEN not in text:
            return end - start, text
    return 1, single
