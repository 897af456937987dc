"""The real child, which kills itself with SIGKILL at a point of each attempt, once what it has sent is stored.

``ERPO_DEATHS``: ``[[kind of record, count], ...]``, the point of the first attempt, of the second, and so on.
``ERPO_DIARY``: a file that gets a line for each call of the model, ``[attempt, "generate" or "score"]``.
"""

import json
import os
import signal
import sys
from pathlib import Path

from erpo_core.analysis import scoring
from erpo_core.generation.transformers import TransformersEngine
from workers.child import __main__ as child
from workers.child.channel import Channel

JOB = json.loads(Path(sys.argv[1]).read_text())
ATTEMPT = JOB["inputs"]["attempt"]
DEATHS = dict(enumerate(json.loads(os.environ["ERPO_DEATHS"]), 1))


class MortalChannel(Channel):
    count = 0

    def emit(self, record) -> None:
        super().emit(record)
        kind, count = DEATHS.get(ATTEMPT, ("", 0))
        self.count += record.kind == kind
        if record.kind == kind and self.count == count:
            with self._changed:
                self._changed.wait_for(lambda: not self._sizes)
            os.kill(os.getpid(), signal.SIGKILL)


def noted(name: str, function):
    def call(*arguments, **options):
        with Path(os.environ["ERPO_DIARY"]).open("a") as diary:
            diary.write(json.dumps([ATTEMPT, name]) + "\n")
        return function(*arguments, **options)

    return call


if __name__ == "__main__":
    TransformersEngine.generate = noted("generate", TransformersEngine.generate)
    scoring._pass = noted("score", scoring._pass)
    child.Channel = MortalChannel
    sys.exit(child.main(sys.argv[1]))
