"""A user's own rewards: functions of TRL's signature that an installed package registers, never code in a request.

    [project.entry-points."erpo_lab.rewards"]
    my_reward = "my_package.rewards:my_reward"

    def my_reward(completions, answer, *, scale=1.0, **kwargs) -> list[float | None]: ...

The API needs the package's metadata alone and never imports it; the workers need the package. A specification names the
reward as ``{"name": "my_reward", "weight": 1, "args": {"scale": 2.0}}``; ``args`` go into each call by name.
"""

import inspect
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from erpo_core.errors import RunError

GROUP = "erpo_lab.rewards"


def plugins() -> dict[str, EntryPoint]:
    """The registered rewards by name; nothing of them is imported."""
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.value)}


class PluginReward:
    """A registered function, called as TRL calls a reward; what goes wrong in it is told under its name."""

    def __init__(self, name: str, entry: EntryPoint, args: dict[str, Any]) -> None:
        """Import it.

        Raises:
            RunError: ``reward_unavailable``: it cannot be imported, or does not take ``args``.
        """
        self.__name__ = name
        self._args = args
        try:
            self._function = entry.load()
            _check_signature(self._function, args)
        except Exception as error:  # a user's module may raise anything
            raise RunError(
                f"the reward {name} ({entry.value}) cannot be used: {type(error).__name__}: {error}",
                code="reward_unavailable",
            ) from error

    def __call__(self, *, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One number, or None for no judgement, for each completion.

        Raises:
            RunError: ``reward_failed``: it raised, or returned something else.
        """
        try:
            values = [_number(value) for value in self._function(completions=completions, **columns, **self._args)]
        except Exception as error:
            raise RunError(
                f"the reward {self.__name__} raised {type(error).__name__}: {error}", code="reward_failed"
            ) from error
        if len(values) != len(completions):
            raise RunError(
                f"the reward {self.__name__} returned {len(values)} values for {len(completions)} completions",
                code="reward_failed",
            )
        return values


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _check_signature(function: Any, args: dict[str, Any]) -> None:
    if inspect.iscoroutinefunction(function):
        raise TypeError("it is a coroutine function; register a plain one")
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    names = {parameter.name for parameter in parameters}
    if unknown := sorted(set(args) - names):
        raise TypeError(f"it takes no argument {unknown[0]!r}")
    raise TypeError("it must take **kwargs: it is called with every column of the data set")
