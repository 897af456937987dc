"""The blob of one traced sequence: named columns in compressed blocks of 256 tokens, readable by range.

Layout: ``"ERPT" | u8 version | u32 header length | header (UTF-8 JSON) | blocks``, integers big-endian. The
header holds the number of tokens, each channel's name, dtype and block sizes, and the crc32 of everything after it. A
block is its values little-endian, byte-shuffled (all first bytes, then all second bytes, ...), then zlib level 1.
"""

import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np

from erpo_core.errors import CodecError

MAGIC = b"ERPT"
VERSION = 1
BLOCK_TOKENS = 256
_PREFIX = struct.Struct(">4sBI")
_FIRST_READ_BYTES = 32 * 1024
"""The header, and with it the whole of a sequence of two thousand tokens: one read in place of one a channel."""
DTYPES = {"token_ids": "<u4", "entropy": "<f4", "rank": "<u2"}
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
    header = json.dumps({"num_tokens": size, "crc32": zlib.crc32(body), "channels": channels}).encode()
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
        if version != VERSION:
            raise CodecError(f"trace version {version} is unknown", code="unsupported_codec")
        raw = head[_PREFIX.size : _PREFIX.size + length]
        if len(raw) < length:
            raw = self._exactly(_PREFIX.size, length)
        try:
            header = json.loads(raw)
        except ValueError as error:
            raise CodecError("the trace's header is damaged") from error
        header["length"] = length
        return header

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
        first, last = start // BLOCK_TOKENS, (end - 1) // BLOCK_TOKENS
        sizes = channel["blocks"]
        raw = self._exactly(offset + sum(sizes[:first]), sum(sizes[first : last + 1]))
        values, position = [], 0
        for size in sizes[first : last + 1]:
            values.append(_unpack(raw[position : position + size], dtype))
            position += size
        joined = np.concatenate(values)
        return joined[start - first * BLOCK_TOKENS : end - first * BLOCK_TOKENS]

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
    return zlib.compress(values.view(np.uint8).reshape(len(values), -1).T.tobytes(), 1)


def _unpack(raw: bytes, dtype: np.dtype) -> np.ndarray:
    try:
        shuffled = np.frombuffer(zlib.decompress(raw), np.uint8)
        return np.ascontiguousarray(shuffled.reshape(dtype.itemsize, -1).T).view(dtype).ravel()
    except (zlib.error, ValueError) as error:
        raise CodecError("a block of the trace is damaged") from error
