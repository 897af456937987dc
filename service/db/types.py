"""Column types that are the same on SQLite and PostgreSQL."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import JSON, BigInteger, LargeBinary, String, Text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeDecorator

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
"""Legal in a model's output and in a JSON body; PostgreSQL refuses NUL, and no database encodes a lone surrogate."""
MAX_INTEGER, MAX_SMALL_INTEGER = 2**63 - 1, 2**31 - 1
"""The largest numbers that both databases can compare a BigInteger and an Integer column with."""
Blob = LargeBinary()


def storable(value: Any) -> Any:
    """The value with every character that cannot be stored replaced by U+FFFD, in nested lists and objects as well."""
    if isinstance(value, str):
        return _UNSTORABLE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {storable(key): storable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [storable(item) for item in value]
    return value


class _Storable(TypeDecorator):
    cache_ok = True
    impl = String

    @property
    def python_type(self) -> type:
        return self.impl.python_type

    def process_bind_param(self, value, dialect):
        return storable(value)


class ShortText(_Storable):
    """A text of bounded length."""

    impl = String
    cache_ok = True


class LongText(_Storable):
    """A text of any length."""

    impl = Text
    cache_ok = True


class Json(_Storable):
    """Plain data; None is NULL."""

    impl = JSON
    cache_ok = True

    def __init__(self) -> None:
        super().__init__(none_as_null=True)

    def load_dialect_impl(self, dialect):
        of_postgresql = dialect.name == "postgresql"
        return dialect.type_descriptor(JSONB(none_as_null=True) if of_postgresql else JSON(none_as_null=True))


class UtcDateTime(TypeDecorator):
    """Aware datetimes as integer microseconds since 1970, UTC."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value, dialect):
        return None if value is None else (value - _EPOCH) // timedelta(microseconds=1)

    def process_result_value(self, value, dialect):
        return None if value is None else _EPOCH + timedelta(microseconds=value)


def now() -> datetime:
    """The time, UTC."""
    return datetime.now(UTC)


def clamp(value: int) -> int:
    """A number that both databases can compare a BigInteger column with; beyond it nothing is stored anyway."""
    return max(-MAX_INTEGER, min(value, MAX_INTEGER))
