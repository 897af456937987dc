"""A script that loads its libraries once and forks for each run: loading takes longer than what a run computes."""

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def serve(main: Callable[..., None]) -> None:
    """Call ``main`` in a process of its own with the arguments of each line, and answer how that process ended."""
    for line in sys.stdin:
        run = os.fork() or _run(main, json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(run, 0)[1]), flush=True)


def _run(main: Callable[..., None], arguments: list[str]) -> None:
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        main(*arguments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


class Forked:
    """A script that ends in ``serve(main)``. A context manager.

    Args:
        folder: for its log.
        num_threads: of torch, in each run.
    """

    def __init__(self, script: Path, folder: Path, *, num_threads: int = 1) -> None:
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(num_threads), "CUDA_VISIBLE_DEVICES": ""}
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(script)],
                env=os.environ | own,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                text=True,
            )

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def run(self, *arguments: str) -> int:
        """How ``main`` ended: 0, 1 for an exception, a negative signal."""
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        ended = self._process.stdout.readline()
        assert ended, self.log
        return int(ended)

    @property
    def log(self) -> str:
        """The end of what the script and its runs said."""
        return self._log.read_text(errors="replace")[-3000:]
