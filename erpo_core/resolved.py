"""What a job's names turned out to be. It holds for all attempts: the next one may find something else under a name."""

from collections.abc import Iterator, Mapping
from typing import Any

from erpo_core.errors import RunError
from erpo_core.job import JobInputs
from erpo_core.records import Resolved, Sink


def report_resolved(sink: Sink, inputs: JobInputs, found: dict[str, Any]) -> None:
    """Emit ``found`` as the run's Resolved.

    Raises:
        RunError: ``inputs_changed``: a file or a hub now holds another model or other problems than an earlier attempt
            found, whose answers and checkpoints this one would go on from.
    """
    before, now = dict(_digests(inputs.resolved)), dict(_digests(found))
    if changed := sorted(name for name in before.keys() & now.keys() if before[name] != now[name]):
        raise RunError(
            f"not what this run began with: {', '.join(changed)}. What it has stored stays; put the model or the data "
            "set in place as it was before a run goes on, or order a new one",
            code="inputs_changed",
        )
    sink.emit(Resolved(found, inputs.run_id))


def _digests(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str | None]]:
    """By dotted names. An evaluation's identity is no name's content: it has the verifier's version in it."""
    for name, value in values.items():
        if isinstance(value, Mapping) and name != "identity":
            yield from _digests(value, f"{path}{name}.")
        elif name.endswith("digest"):
            yield path + name, value
