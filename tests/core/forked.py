"""Scripts that load their libraries once and fork for each run: loading takes longer than what the runs compute."""

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def serve(main: Callable[..., None]) -> None:
    """For each line of the input, the arguments of one run and the environment of each of its processes: fork them.

    Its output is a line a run: how each process ended, as ``subprocess`` has it.
    """
    for line in sys.stdin:
        arguments, environments = json.loads(line)
        processes = [_start(main, arguments, environment) for environment in environments]
        ends = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        print(json.dumps(ends), flush=True)


def _start(main: Callable[..., None], arguments: list[str], environment: dict[str, str]) -> int:
    process = os.fork()
    if process:
        return process
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.environ.update(environment)
    code = 1
    try:
        main(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


class Forked:
    """A script that ends in ``serve(main)``. A context manager.

    Args:
        folder: for its log.
        num_threads: of torch, in each process of a run.
    """

    def __init__(self, script: Path, folder: Path, *, num_threads: int = 1) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        environment["OMP_NUM_THREADS"] = str(num_threads)
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(script)],
                env=environment,
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

    def run(self, *arguments: str, num_ranks: int = 1) -> list[int]:
        """How each process ended of ``main(*arguments)``: one, or the ranks of ``torch.distributed``."""
        environments = [{}] if num_ranks == 1 else _ranks(num_ranks)
        self._process.stdin.write(json.dumps([arguments, environments]) + "\n")
        self._process.stdin.flush()
        told = self._process.stdout.readline()
        assert told, self.log
        return json.loads(told)

    @property
    def log(self) -> str:
        """The end of what the script and its runs said."""
        return self._log.read_text(errors="replace")[-3000:]


def _ranks(number: int) -> list[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number)}
    return [meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
