"""``python -m erpo_core.rewards.verify_server``: checks answers, one JSON line in, one JSON line out.

Runs as a process of its own because nothing else bounds math-verify: its time-outs are signals, some expressions never
return from inside C, and others take all memory. The parent kills it on overrun; here are only the bounds that must
hold when the parent is gone: memory, and processor time per request.
"""

import json
import logging
import os
import re
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

from erpo_core.data.formats import is_answer

MEMORY_BYTES = 2 * 2**30
RELATIVE_TOLERANCE = 1e-6
_COMMAND = re.compile(r"\\[a-zA-Z]+\s*(?=[{\[])")


def main() -> None:
    """Serve until standard input ends. ``{"ready": true}`` comes first."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    cpu_seconds = float(sys.argv[1])
    # Whatever a library prints must not get between the answers.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.disable(logging.WARNING)  # math-verify warns at every call that its own time-out is off
    import math_verify  # noqa: F401

    _reply(out, {"ready": True})
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # its default action ends the process, even inside C
        verdict = _serve(json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        _reply(out, {"verdict": verdict})


def _reply(out: Any, message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def _serve(request: dict[str, str]) -> str:
    try:
        if "pattern" in request:
            return "right" if re.search(request["pattern"], request["text"], re.DOTALL) else "wrong"
        if "answer" not in request:
            return read(request["gold"])
        return judge(request["gold"], request["answer"])
    except MemoryError:
        return "crashed"
    except RecursionError:
        return "unparsable"
    except BaseException as error:  # math-verify's TimeoutException is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return "unparsable"


def read(gold: str) -> str:
    """``expression``, ``text`` (compared character by character) or ``nothing``."""
    parsed = _parsed_gold(gold)
    if parsed and not isinstance(parsed[0], str):
        return "expression"
    # Without mathematics: text, unless only commands and their empty arguments are left.
    return "text" if is_answer(_COMMAND.sub("", gold)) else "nothing"


def judge(gold: str, answer: str) -> str:
    """``right``, ``wrong`` or ``unparsable``. The gold comes first: math-verify is not symmetric."""
    from math_verify import verify

    expected, found = _parsed_gold(gold), _parse(answer)
    if not expected or not found:
        return "unparsable"
    if not verify(list(expected), list(found), timeout_seconds=None):
        return "wrong"
    if "%" in gold or "%" in answer:  # 9\% is 9 by math-verify's design
        return "right"
    return "right" if _close(expected[0], found[0]) else "wrong"


@lru_cache(maxsize=4096)
def _parsed_gold(gold: str) -> tuple[Any, ...]:
    return _parse(gold)


def _parse(content: str) -> tuple[Any, ...]:
    """Always within one box: a bare ``2x+1`` would be read as 2, and several boxes as a set.

    As LaTeX only: math-verify's other reading takes the last number of whatever LaTeX does not explain.
    """
    from math_verify import LatexExtractionConfig, parse

    how = [LatexExtractionConfig(boxed_match_priority=0)]
    return tuple(parse(f"\\boxed{{{content}}}", extraction_config=how, parsing_timeout=None))


def _close(expected: Any, found: Any) -> bool:
    """math-verify compares at 6 decimals: 1e-12 would be 0. Small numbers must agree relatively as well."""
    if not (getattr(expected, "is_number", False) and getattr(found, "is_number", False)):
        return True
    left, right = complex(expected.evalf(20)), complex(found.evalf(20))
    if max(abs(left), abs(right)) >= 1:
        return True
    return abs(left - right) <= RELATIVE_TOLERANCE * abs(left)


if __name__ == "__main__":
    main()
