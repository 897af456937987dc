"""What to say when the model hub does not deliver."""

from erpo_core.errors import RunError

_REASONS = (
    ({"GatedRepoError"}, "it is gated; accept its terms on the hub, and set HF_TOKEN where the worker runs"),
    ({"RevisionNotFoundError"}, "it has no such revision; name another after the @, or none"),
    (
        {"RepositoryNotFoundError", "DatasetNotFoundError"},
        "there is none of that name, or it is private; mend the name, or set HF_TOKEN where the worker runs",
    ),
    ({"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError"}, "it is out of reach; {instead}"),
)
"""By class names of huggingface_hub and datasets, the special ones first."""
_DEPTH = 8


def undelivered(name: str, error: Exception, *, code: str, instead: str) -> RunError:
    """The error of a job whose model or data set ``name`` did not come, with the mend.

    Args:
        error: of the hub's clients, which raise a dozen unrelated types.
        instead: what to do where no hub is in reach.
    """
    classes = _classes(error)
    found = (text.format(instead=instead) for names, text in _REASONS if names & classes)
    return RunError(f"the hub did not deliver {name!r}: {next(found, str(error))}", code=code)


def _classes(error: BaseException) -> set[str]:
    """Names of the error's classes, and of those that it came from."""
    seen: list[BaseException] = [error]
    while (cause := seen[-1].__cause__ or seen[-1].__context__) is not None and len(seen) < _DEPTH:
        seen.append(cause)
    return {cls.__name__ for one in seen for cls in type(one).__mro__}
