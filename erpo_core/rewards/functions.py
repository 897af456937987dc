"""The registered rewards, as functions of TRL's signature.

Each is called with ``prompts``, ``completions`` (texts, or lists of chat turns), ``completion_ids`` and the data set's
columns, and returns a number for each completion. ``__name__`` is the name it is reported under.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from erpo_core.errors import SpecError
from erpo_core.rewards.answers import has_answer
from erpo_core.rewards.plugins import PluginReward, plugins
from erpo_core.rewards.verify import Verdict, Verifier
from erpo_core.specs.common import RewardSpec

Reward = Callable[..., list[float]]
MAX_PATTERN_CHARS = 1000
"""Of all regular expressions of an order together: wide ranges that ignore case take a millisecond a character."""


def reward_functions(rewards: Sequence[RewardSpec], verifier: Verifier) -> list[Reward]:
    """The functions of a specification, in its order. A name that comes twice gets a number: ``regex``, ``regex_2``.

    Raises:
        SpecError: as :func:`check_rewards`.
        RunError: ``reward_unavailable``: a user's own cannot be imported.
    """
    check_rewards(rewards)
    functions, seen, own = [], {}, plugins()
    for spec in rewards:
        seen[spec.name] = seen.get(spec.name, 0) + 1
        name = spec.name if seen[spec.name] == 1 else f"{spec.name}_{seen[spec.name]}"
        if spec.name in _REGISTRY:
            functions.append(_REGISTRY[spec.name](name, verifier, **spec.args))
        else:
            functions.append(PluginReward(name, own[spec.name], spec.args))
    return functions


def known_rewards() -> list[dict[str, Any]]:
    """Every reward that may be named, by name: ``name``, ``description``, ``arguments``, ``source``.

    Of the user's own nothing is imported: ``source`` is the package that registers it, the rest is None.
    """
    found = {
        name: {
            "name": name,
            "description": " ".join((cls.__doc__ or "").split("\n\n")[0].split()),
            "arguments": list(cls.arguments),
            "source": "built-in",
        }
        for name, cls in _REGISTRY.items()
    }
    for name, entry in plugins().items():
        package = entry.dist.name if entry.dist else entry.value
        found.setdefault(name, {"name": name, "description": None, "arguments": None, "source": package})
    return [found[name] for name in sorted(found)]


def judge_answers(rewards: Sequence[RewardSpec]) -> bool:
    """Whether one of them compares answers with golds by the verifier, so that golds must be readable."""
    return any(spec.name == "accuracy" for spec in rewards)


def check_rewards(rewards: Sequence[RewardSpec], *, pointer: str = "/rewards") -> None:
    """Refuse names that nobody has registered, and arguments that a reward does not take.

    A user's own reward is not imported: its arguments are checked in the worker.

    Raises:
        SpecError: naming the field.
    """
    _check_patterns(rewards, pointer)
    for index, spec in enumerate(rewards):
        where = f"{pointer}/{index}/args"
        cls = _REGISTRY.get(spec.name)
        if cls is None:
            _check_plugin(spec.name, f"{pointer}/{index}/name")
            continue
        for name in spec.args:
            if name not in cls.arguments:
                known = ", ".join(cls.arguments) or "no arguments"
                raise SpecError(f"{spec.name} takes no argument {name!r}", pointer=where, mend=f"it takes {known}")
        try:
            cls.check(**spec.args)
        except (TypeError, ValueError, re.error, RecursionError, OverflowError) as error:
            raise SpecError(f"{spec.name}: {error}", pointer=where, mend=cls.mend) from None


def _check_patterns(rewards: Sequence[RewardSpec], pointer: str) -> None:
    """Before any is compiled."""
    num_chars = 0
    for index, spec in enumerate(rewards):
        if spec.name == "regex":
            num_chars += len(str(spec.args.get("pattern", "")))
        if num_chars > MAX_PATTERN_CHARS:
            raise SpecError(
                f"regex: the patterns up to this one have {num_chars} characters",
                pointer=f"{pointer}/{index}/args",
                mend=f"write at most {MAX_PATTERN_CHARS} in all patterns together, or register a reward of your own",
            )


def _check_plugin(name: str, pointer: str) -> None:
    known = sorted(_REGISTRY.keys() | plugins().keys())
    if name not in known:
        raise SpecError(
            f"there is no reward {name!r}",
            pointer=pointer,
            mend=f"name one of {', '.join(map(repr, known))}, or install the package that registers it in the "
            "entry-point group erpo_lab.rewards",
            code="unknown_reward",
        )


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """A completion's text: itself, or the contents of its assistant turns."""
    if isinstance(completion, str):
        return completion
    return "".join(turn.get("content") or "" for turn in completion if turn.get("role", "assistant") == "assistant")


class _Function:
    arguments: tuple[str, ...] = ()
    mend = ""

    def __init__(self, name: str, verifier: Verifier) -> None:
        self.__name__ = name
        self._verifier = verifier

    @staticmethod
    def check() -> None:
        """Raise ValueError for values out of range."""


class Accuracy(_Function):
    """1 if the last boxed answer equals the gold (column ``answer``), otherwise 0.

    ``last_verdicts`` holds the verdicts of the last call, in the order of its completions.
    """

    def __init__(self, name: str, verifier: Verifier) -> None:
        super().__init__(name, verifier)
        self.last_verdicts: list[Verdict] = []

    def __call__(self, *, completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        texts = map(completion_text, completions)
        self.last_verdicts = self._verifier.check_many(list(zip(answer, texts, strict=True)))
        return [float(verdict is Verdict.RIGHT) for verdict in self.last_verdicts]


class BoxedFormat(_Function):
    """1 if the completion holds a balanced box with something in it, otherwise 0."""

    def __call__(self, *, completions: list[Any], **_: Any) -> list[float]:
        return [float(has_answer(completion_text(completion))) for completion in completions]


class LengthPenalty(_Function):
    """DAPO's soft overlong punishment: 0 up to ``max_completion_len - soft_punish_cache`` tokens, falling to -1."""

    arguments = ("max_completion_len", "soft_punish_cache")
    mend = 'write for example {"max_completion_len": 1024, "soft_punish_cache": 256}'

    def __init__(self, name: str, verifier: Verifier, *, max_completion_len: int, soft_punish_cache: int) -> None:
        super().__init__(name, verifier)
        self._longest, self._cache = max_completion_len, soft_punish_cache

    def __call__(self, *, completion_ids: list[Sequence[int]], **_: Any) -> list[float]:
        free = self._longest - self._cache
        return [-min(1.0, max(0.0, (len(ids) - free) / self._cache)) for ids in completion_ids]

    @staticmethod
    def check(*, max_completion_len: int, soft_punish_cache: int) -> None:
        """Both in tokens; the cache within the length."""
        if type(max_completion_len) is not int or type(soft_punish_cache) is not int:
            raise ValueError("max_completion_len and soft_punish_cache must be whole numbers")
        if not 1 <= soft_punish_cache <= max_completion_len:
            raise ValueError("soft_punish_cache must be from 1 to max_completion_len")
        if max_completion_len >= 2**31:
            raise ValueError("max_completion_len must be at most 2147483647")


class Regex(_Function):
    """1 if the regular expression ``pattern`` is found in the completion (``.`` matches line ends), otherwise 0.
    All patterns of an order together: up to 1,000 characters.
    """

    arguments = ("pattern",)
    mend = r'write for example {"pattern": "\\\\boxed\\{-?\\d+\\}"}'

    def __init__(self, name: str, verifier: Verifier, *, pattern: str) -> None:
        super().__init__(name, verifier)
        self._pattern = pattern

    def __call__(self, *, completions: list[Any], **_: Any) -> list[float]:
        found = self._verifier.match_many(self._pattern, [completion_text(completion) for completion in completions])
        return [float(verdict is Verdict.RIGHT) for verdict in found]

    @staticmethod
    def check(*, pattern: str) -> None:
        """A pattern that compiles."""
        if not isinstance(pattern, str):
            raise ValueError("pattern must be text")
        re.compile(pattern)


_REGISTRY: dict[str, type[Any]] = {
    "accuracy": Accuracy,
    "boxed_format": BoxedFormat,
    "length_penalty": LengthPenalty,
    "regex": Regex,
}
