"""The verifier process: ``python -m erpo_core.rewards.verify_server``. JSON lines in, JSON lines out.

A request is ``[gold, answer]``, an answer one of the verdicts. Nothing that was parsed ever leaves the process: even
the text of some expressions takes for ever to print.
"""

import json
import resource
import sys

_MEMORY_BYTES = 2 * 2**30


def main() -> None:
    """Answer until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    from erpo_core.rewards.equivalence import verdict

    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        gold, answer = json.loads(line)
        try:
            found = verdict(gold, answer)
        except (MemoryError, RecursionError):
            found = "crashed"
        except Exception:
            # math-verify and sympy raise anything at all on a model's output.
            found = "unparsable"
        out.write(json.dumps(found) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
