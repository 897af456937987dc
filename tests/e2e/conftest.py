"""A real stack of its own data directory, and a tiny model that it may name."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tiny_model import make_tiny_model

# What a shell starts in the background ignores SIGINT, and so would the stacks that these tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Stack:
    """``erpo up`` as a process."""

    def __init__(self, data_dir: Path, **environment: str) -> None:
        self.data_dir = data_dir
        self.output = data_dir.with_suffix(".output")
        fast = {"ERPO_SWEEP_SECONDS": "2", "ERPO_LEASE_SECONDS": "10", "ERPO_HEARTBEAT_SECONDS": "1"}
        # Two stacks that start at the same time would both find the usual port free.
        own = {"ERPO_DATA_DIR": str(data_dir), "ERPO_PORT": "0", "OMP_NUM_THREADS": "1"}
        self.environment = os.environ | fast | own | environment
        self.process: subprocess.Popen | None = None
        self.url = ""

    def start(self, seconds: float = 90) -> "Stack":
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service.cli.main", "up"],
                env=self.environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        end = time.monotonic() + seconds
        while not self.is_serving():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.1)
        self.url = json.loads((self.data_dir / "server.json").read_text())["url"]
        return self

    def is_serving(self) -> bool:
        """``server.json`` is written once everything answers."""
        try:
            return json.loads((self.data_dir / "server.json").read_text())["pid"] == self.process.pid
        except (OSError, ValueError):
            return False

    def said(self) -> str:
        logs = [self.output, *sorted((self.data_dir / "logs").glob("*.log"))]
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs if log.exists())

    def processes(self) -> list[psutil.Process]:
        """Every process that works on this data directory, by the environment that all of them inherit."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("ERPO_DATA_DIR") == str(self.data_dir):
                    found.append(process)
            except psutil.Error:
                continue
        return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]

    def wait_until_gone(self, seconds: float) -> list[str]:
        """The processes that are still there after some time."""
        end = time.monotonic() + seconds
        while self.processes() and time.monotonic() < end:
            time.sleep(0.05)
        return [" ".join(process.cmdline()) for process in self.processes()]

    def stop(self, number: int, seconds: float = 30) -> list[str]:
        """Send a signal to the parent; what is left after some time: three times what a stop takes at most."""
        self.process.send_signal(number)
        left = self.wait_until_gone(seconds)
        self.process.wait(5)
        return left

    def end(self) -> None:
        """Whatever the test left."""
        for process in self.processes():
            process.kill()
        if self.process is not None:
            self.process.wait(10)


@pytest.fixture(scope="session")
def model_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make_tiny_model(root / "tiny")
    return root


@pytest.fixture(scope="session")
def new_stack(tmp_path_factory, model_root, model_cache):
    """Makes stacks; whatever is left of them at the end of the session is killed."""
    made = []

    def new() -> Stack:
        folder = tmp_path_factory.mktemp("stack") / "a data dir"
        roots = json.dumps([str(model_root)])
        made.append(Stack(folder, ERPO_MODEL_ROOTS=roots, ERPO_CACHE_DIR=str(model_cache)))
        return made[-1]

    yield new
    for stack in made:
        stack.end()


@pytest.fixture
def stack(new_stack):
    stack = new_stack()
    yield stack
    stack.end()


@pytest.fixture(scope="module")
def shared_stack(new_stack):
    """A running stack that serves all tests of a module."""
    stack = new_stack()
    yield stack.start(300)
    stack.end()
