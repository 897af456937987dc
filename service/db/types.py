"""Column types that are the same on SQLite and PostgreSQL."""

from datetime import UTC, datetime, timedelta

from sqlalchemy import JSON, BigInteger, LargeBinary
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeDecorator

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
Blob = LargeBinary()


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
