"""Processes of the embedded mode: each dies with the one that started it, and writes to a log of its own."""

import ctypes
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_LOG_BYTES = 8 * 2**20


@dataclass
class Service:
    """A command under supervision."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    stdin: bytes | None = None
    keep: tuple[int, ...] = ()
    """File descriptors that the process inherits."""
    process: subprocess.Popen | None = None
    is_asked: bool = False

    def start(self) -> None:
        """Start it in a session of its own: Ctrl-C in the terminal reaches only the parent, which then stops it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        mode = "ab" if self.log.exists() and self.log.stat().st_size < _LOG_BYTES else "wb"
        with self.log.open(mode) as output:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL if self.stdin is None else subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=self.keep,
                preexec_fn=_die_with_parent,
            )
        if self.stdin is not None:
            self.process.stdin.write(self.stdin)
            self.process.stdin.close()

    def is_alive(self) -> bool:
        """Has it been started, and not ended?"""
        return self.process is not None and self.process.poll() is None

    def ask_to_stop(self) -> None:
        """SIGTERM, once."""
        if self.is_alive() and not self.is_asked:
            self.is_asked = True
            self.process.terminate()

    def stop(self, seconds: float) -> None:
        """SIGTERM, and SIGKILL after some time. When this returns the process has ended."""
        self.ask_to_stop()
        if self.process is None:
            return
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def log_tail(self, size: int = 2000) -> str:
        """The end of its log."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - size))
            return file.read().decode(errors="replace")


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def free_port(host: str, wanted: int = 0) -> int | None:
    """A port that can be bound: ``wanted``, or any if 0. None if ``wanted`` is taken."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, wanted))
        except OSError:
            return None
        return probe.getsockname()[1]


def wait_for_port(host: str, port: int, service: Service, seconds: float) -> bool:
    """Wait until somebody listens; false if the service ended or the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and service.is_alive():
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex((host, port)) == 0:
                return True
        time.sleep(0.02)
    return False
