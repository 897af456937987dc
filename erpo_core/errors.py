"""Every error of ERPO Lab, as one tree.

    ErpoError
    ├── SpecError            a request that cannot be honoured as written
    │   ├── DatasetError
    │   └── UnknownReferenceError
    ├── NotFoundError        an id in a path that names nothing
    ├── ConflictError        the object's state forbids the action
    ├── AccessError          not authenticated, or the scope is too small
    ├── UnavailableError     database or broker out of reach; the only kind worth retrying
    ├── CodecError           a stored trace that cannot be read
    └── RunError             a job that failed in its child; ``code`` becomes the job's ``status_reason``

Each carries a stable snake_case ``code``; the HTTP status of a code is decided in ``service.errors`` alone.
"""


class ErpoError(Exception):
    """Base class. ``message`` is for people, ``code`` for programs."""

    code = "error"
    mend = ""

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code

    @property
    def told(self) -> str:
        """The message, and the mend where there is one."""
        return f"{self.message}; {self.mend}" if self.mend else self.message

    def __reduce__(self):
        return _rebuild, (type(self), self.__dict__)


def _rebuild(cls: type[ErpoError], state: dict) -> ErpoError:
    error = cls.__new__(cls)
    Exception.__init__(error, state["message"])
    error.__dict__.update(state)
    return error


class SpecError(ErpoError, ValueError):
    """A field of a request is wrong. ``pointer`` is its JSON pointer, ``mend`` says what to write instead."""

    code = "invalid_spec"

    def __init__(self, message: str, *, pointer: str = "", mend: str = "", code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.pointer = pointer
        self.mend = mend


class DatasetError(SpecError):
    """A data set is empty, malformed (the message names the line) or has no usable row."""

    code = "invalid_dataset"


class UnknownReferenceError(SpecError):
    """A model, data set, run or checkpoint named in a body does not exist or may not be used."""

    code = "unknown_reference"


class NotFoundError(ErpoError, LookupError):
    """An id in a path names nothing that the caller may see."""

    code = "not_found"


class ConflictError(ErpoError):
    """The state of a job forbids the transition. ``state`` is the state it is in."""

    code = "illegal_transition"

    def __init__(self, message: str, *, state: str = "", code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.state = state


class FencedError(ConflictError):
    """A write by an attempt that no longer owns its job."""

    code = "fenced"


class AccessError(ErpoError):
    """``unauthenticated`` or ``insufficient_scope``."""

    code = "unauthenticated"


class UnavailableError(ErpoError):
    """Database or broker out of reach."""

    code = "unavailable"


class CodecError(ErpoError, ValueError):
    """A trace blob is truncated, damaged or of an unknown version."""

    code = "corrupt_trace"


class RunError(ErpoError, RuntimeError):
    """A job failed in its child. ``code``: ``oom``, ``nonfinite_loss``, ``timeout``, ``preflight_failed``, ..."""

    code = "failed"
