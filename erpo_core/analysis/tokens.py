"""What a token looks like on a page: byte-level tokens can be parts of one character."""

from collections.abc import Sequence

_BROKEN = "\ufffd"
_MAX_PARTS = 12


def display_tokens(tokenizer, token_ids: Sequence[int]) -> list[str]:
    """One text per token; together they are the decoded sequence.

    Where several tokens form one character the first carries it and the others are empty. What never becomes valid
    UTF-8 stays the replacement character.
    """
    texts: list[str] = []
    position = 0
    while position < len(token_ids):
        length, text = _shortest_whole(tokenizer, token_ids, position)
        texts += [text] + [""] * (length - 1)
        position += length
    return texts


def _shortest_whole(tokenizer, token_ids: Sequence[int], start: int) -> tuple[int, str]:
    single = _decode(tokenizer, token_ids[start : start + 1])
    if _BROKEN not in single:
        return 1, single
    for length in range(2, min(_MAX_PARTS, len(token_ids) - start) + 1):
        text = _decode(tokenizer, token_ids[start : start + length])
        if _BROKEN not in text:
            return length, text
    return 1, single


def _decode(tokenizer, token_ids: Sequence[int]) -> str:
    return tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
