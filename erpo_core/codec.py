"""The blob of one traced sequence: named columns in compressed blocks of 1,024 tokens, readable by range.

Layout: ``"ERPT" | u8 version | u32 header length | header | blocks``, integers big-endian. The header is JSON, deflated
with a dictionary of what headers have in common: the number of tokens, those of a block, each channel's name, dtype
and block sizes in bytes, and the crc32 of everything after it. A block is its values little-endian, byte-shuffled (all
first bytes, then all second bytes, ...), in one zlib stream where each byte's plane has Huffman codes of its own.

Version 1, which is still read, has plain JSON as its header and blocks of 256 tokens.
"""

import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np

from erpo_core.errors import CodecError

MAGIC = b"ERPT"
VERSION = 2
BLOCK_TOKENS = 1024
_BLOCK_TOKENS_1 = 256
_LEVEL = 6
_HEADER_WORDS = b"".join(
    b'{"name":"%s","dtype":"<f2","blocks":[' % name
    for name in (b"normalized_progress", b"leverage", b"advantage", b"psi", b"gate", b"progress", b"varentropy")
) + (
    b'{"num_tokens":1024,"block_tokens":1024,"crc32":1234567890,"channels":[{"name":"token_ids","dtype":"<u4","blocks":['
    b'1234]},{"name":"entropy","dtype":"<f4","blocks":[1234]},{"name":"logp","dtype":"<f2","blocks":[1234]},{"name":'
    b'"top_prob","dtype":"<f2","blocks":[1234]},{"name":"rank","dtype":"<u2","blocks":[1234]}]}'
)
"""The dictionary of headers: a part of the format, for what is deflated with one dictionary inflates with no other."""
_PREFIX = struct.Struct(">4sBI")
_FIRST_READ_BYTES = 32 * 1024
"""The header, and with it the whole of a sequence of two thousand tokens: one read in place of one a channel."""
DTYPES = {"token_ids": "<u4", "entropy": "<f4", "entropy_low": "<f4", "entropy_high": "<f4", "rank": "<u2"}
"""Entropy stays float32: as float16 its error moves the top-5% set. Every channel not named is float16."""
_HALF = "<f2"


def encode_trace(columns: Mapping[str, np.ndarray]) -> bytes:
    """Pack columns of equal length. ``rank`` saturates at 65,535; values beyond float16 become its largest.

    Raises:
        ValueError: the columns differ in length, or there are none.
    """
    lengths = {len(column) for column in columns.values()}
    if len(lengths) != 1:
        raise ValueError(f"columns: expected one or more of equal length, got lengths {sorted(lengths)}")
    size = lengths.pop()
    channels, parts = [], []
    for name, column in columns.items():
        values = _cast(np.asarray(column), DTYPES.get(name, _HALF))
        blocks = [_pack(values[start : start + BLOCK_TOKENS]) for start in range(0, size, BLOCK_TOKENS)]
        channels.append({"name": name, "dtype": values.dtype.str, "blocks": [len(block) for block in blocks]})
        parts += blocks
    body = b"".join(parts)
    facts = {"num_tokens": size, "block_tokens": BLOCK_TOKENS, "crc32": zlib.crc32(body), "channels": channels}
    header = _deflate([json.dumps(facts, separators=(",", ":")).encode()], _HEADER_WORDS)
    return _PREFIX.pack(MAGIC, VERSION, len(header)) + header + body


def decode_trace(
    blob: bytes, names: Sequence[str] | None = None, start: int = 0, end: int | None = None
) -> dict[str, np.ndarray]:
    """Columns of a whole blob, which is checked against its crc32.

    Raises:
        CodecError: the blob is truncated, damaged or of an unknown version.
    """
    reader = TraceReader(lambda offset, length: blob[offset : offset + length])
    if zlib.crc32(blob[reader.body_offset :]) != reader.header["crc32"]:
        raise CodecError("the trace does not match its checksum")
    return reader.columns(names, start, end)


class TraceReader:
    """Reads ranges of a stored blob through ``read(offset, length)``, touching only the blocks that hold them."""

    def __init__(self, read: Callable[[int, int], bytes]) -> None:
        self._read = read

    @cached_property
    def _head(self) -> bytes:
        return self._read(0, _FIRST_READ_BYTES)

    @cached_property
    def header(self) -> dict:
        """The header. Raises CodecError."""
        head = self._head
        if len(head) < _PREFIX.size:
            raise CodecError("the trace is truncated")
        magic, version, length = _PREFIX.unpack_from(head)
        if magic != MAGIC:
            raise CodecError("this is no trace")
        if version not in (1, VERSION):
            raise CodecError(f"trace version {version} is unknown", code="unsupported_codec")
        raw = head[_PREFIX.size : _PREFIX.size + length]
        if len(raw) < length:
            raw = self._exactly(_PREFIX.size, length)
        try:
            header = json.loads(raw if version == 1 else _inflate(raw, _HEADER_WORDS))
        except (ValueError, zlib.error) as error:
            raise CodecError("the trace's header is damaged") from error
        return {"block_tokens": _BLOCK_TOKENS_1, **header, "length": length}

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence."""
        return self.header["num_tokens"]

    @property
    def channels(self) -> list[str]:
        """Names of the columns, in stored order."""
        return [channel["name"] for channel in self.header["channels"]]

    @property
    def body_offset(self) -> int:
        """Where the first block begins."""
        return _PREFIX.size + self.header["length"]

    def columns(
        self, names: Sequence[str] | None = None, start: int = 0, end: int | None = None
    ) -> dict[str, np.ndarray]:
        """Values of tokens ``start`` to ``end`` (exclusive) of the named channels, or of all.

        Raises:
            KeyError: the trace has no channel of that name.
            CodecError: a block is truncated or damaged.
        """
        end = self.num_tokens if end is None else min(end, self.num_tokens)
        start = min(max(start, 0), end)
        wanted = self.channels if names is None else list(names)
        missing = set(wanted) - set(self.channels)
        if missing:
            raise KeyError(f"no channel {', '.join(sorted(missing))}")
        found, offset = {}, self.body_offset
        for channel in self.header["channels"]:
            if channel["name"] in wanted:
                found[channel["name"]] = self._column(channel, offset, start, end)
            offset += sum(channel["blocks"])
        return {name: found[name] for name in wanted}

    def _column(self, channel: dict, offset: int, start: int, end: int) -> np.ndarray:
        dtype = np.dtype(channel["dtype"])
        if start == end:
            return np.empty(0, dtype)
        size = self.header["block_tokens"]
        first, last = start // size, (end - 1) // size
        sizes = channel["blocks"]
        raw = self._exactly(offset + sum(sizes[:first]), sum(sizes[first : last + 1]))
        values, position = [], 0
        for length in sizes[first : last + 1]:
            values.append(_unpack(raw[position : position + length], dtype))
            position += length
        joined = np.concatenate(values)
        return joined[start - first * size : end - first * size]

    def _exactly(self, offset: int, length: int) -> bytes:
        is_held = offset + length <= len(self._head)
        data = self._head[offset : offset + length] if is_held else self._read(offset, length)
        if len(data) < length:
            raise CodecError("the trace is truncated")
        return data


def _cast(values: np.ndarray, dtype: str) -> np.ndarray:
    target = np.dtype(dtype)
    if target.kind == "u":
        return np.clip(values, 0, np.iinfo(target).max).astype(target)
    limit = np.finfo(target).max
    finite = np.isfinite(values)
    return np.where(finite, np.clip(values, -limit, limit), values).astype(target)


def _pack(values: np.ndarray) -> bytes:
    planes = values.view(np.uint8).reshape(len(values), -1).T
    return _deflate([plane.tobytes() for plane in planes])


def _deflate(parts: Sequence[bytes], words: bytes = b"") -> bytes:
    """One zlib stream; each part begins a deflate block, whose Huffman codes are its own."""
    stream = zlib.compressobj(_LEVEL, zdict=words)
    return b"".join([*(stream.compress(part) + stream.flush(zlib.Z_BLOCK) for part in parts), stream.flush()])


def _inflate(raw: bytes, words: bytes) -> bytes:
    stream = zlib.decompressobj(zdict=words)
    return stream.decompress(raw) + stream.flush()


def _unpack(raw: bytes, dtype: np.dtype) -> np.ndarray:
    try:
        shuffled = np.frombuffer(zlib.decompress(raw), np.uint8)
        return np.ascontiguousarray(shuffled.reshape(dtype.itemsize, -1).T).view(dtype).ravel()
    except (zlib.error, ValueError) as error:
        raise CodecError("a block of the trace is damaged") from error
