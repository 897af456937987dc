"""The blob of a trace: what is read is what was written, in ranges, under old versions and after damage."""

from base64 import b64decode

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from erpo_core.codec import BLOCK_TOKENS, TraceReader, decode_trace, encode_trace
from erpo_core.errors import CodecError

VERSION_1 = b64decode(
    "RVJQVAEAAADreyJudW1fdG9rZW5zIjogNjAwLCAiY3JjMzIiOiA2OTQ3MTEzNDksICJjaGFubmVscyI6IFt7Im5hbWUiOiAidG9r"
    "ZW5faWRzIiwgImR0eXBlIjogIjx1NCIsICJibG9ja3MiOiBbMjQsIDI0LCAyMV19LCB7Im5hbWUiOiAiZW50cm9weSIsICJkdHlw"
    "ZSI6ICI8ZjQiLCAiYmxvY2tzIjogWzMxLCAzMywgMjhdfSwgeyJuYW1lIjogInJhbmsiLCAiZHR5cGUiOiAiPHUyIiwgImJsb2Nr"
    "cyI6IFsxNCwgMTUsIDE1XX1dfXgBY2BkYmZhGLkEwygYDYERHAIA/VoB/3gBY2RiZmFgHLkEwygYDYERHAIAAmgCAHgBY2JmYWBk"
    "ogHBMApAIQAA2OkAtHgBY2AYBSM6BBoYHBoWHGAYqRSDnT0IjFgKAP0MlQF4AWNgGAUjOQQaFhxgaGBwGLGUvb09gx2QGKkUAPmK"
    "liJ4AWNgGFqggcGhYcEBBqpTdvYgwEB1CgA8tDNoeAFjYBgFIzkEAAIAAAF4AWNkHNmAYYQDAIKPAQF4AWNiog1goBEAAFvIALE="
)
"""600 tokens as version 1 wrote them: ids i % 5, entropies (i % 7) / 4, ranks i // 256."""


def columns(size: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(size)
    return {
        "token_ids": generator.integers(0, 2**32, size, dtype=np.uint32),
        "entropy": generator.random(size, dtype=np.float32) * 5,
        "logp": -generator.random(size).astype(np.float16),
        "rank": generator.integers(0, 2**16, size).astype(np.uint16),
    }


@given(st.integers(0, 2500), st.integers(0, 2600), st.integers(0, 2600))
def test_any_range_of_a_trace_is_that_range_of_its_columns(size, start, end):
    start, end = sorted((start, end))
    whole = columns(size)
    for name, values in decode_trace(encode_trace(whole), start=start, end=end).items():
        assert values.dtype == whole[name].dtype
        assert values.tolist() == whole[name][start:end].tolist()


def test_a_range_reads_only_the_blocks_that_hold_it():
    blob = encode_trace(columns(200 * BLOCK_TOKENS))
    reads = []

    def read(offset, length):
        reads.append(min(length, len(blob) - offset))
        return blob[offset : offset + length]

    TraceReader(read).columns(["entropy"], 300, 310)
    assert sum(reads) < len(blob) / 10


def test_ranks_saturate_and_large_values_stay_finite():
    back = decode_trace(encode_trace({"rank": np.array([70_000]), "psi": np.array([1e9])}))
    assert back["rank"][0] == 65_535
    assert np.isfinite(back["psi"][0])


@pytest.mark.parametrize(("start", "end"), [(0, 600), (250, 520), (512, 600)])
def test_what_version_1_stored_is_still_read(start, end):
    found = decode_trace(VERSION_1, start=start, end=end)
    place = np.arange(start, end)
    assert found["token_ids"].tolist() == (place % 5).tolist()
    assert found["entropy"].tolist() == (place % 7 / 4).tolist()
    assert found["rank"].tolist() == (place // 256).tolist()


def test_a_short_answer_takes_few_bytes_beside_its_values():
    few = {name: values[:20] for name, values in columns(600).items()}
    assert len(encode_trace(few)) < sum(values.nbytes for values in few.values()) + 150


@pytest.mark.parametrize("damage", ["truncate", "flip", "header", "magic", "version"])
def test_a_damaged_trace_is_refused(damage):
    blob = bytearray(encode_trace(columns(600)))
    if damage == "truncate":
        blob = blob[:-10]
    elif damage in ("flip", "header"):
        blob[-10 if damage == "flip" else 20] ^= 0xFF
    else:
        blob[0 if damage == "magic" else 4] = 99
    with pytest.raises(CodecError):
        decode_trace(bytes(blob))


def test_columns_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="columns"):
        encode_trace({"entropy": np.zeros(2), "logp": np.zeros(3)})
