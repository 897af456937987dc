"""A child that does what its job's ``spec["script"]`` says, through the real channel: to test everything around it.

Steps: ``["metrics", first, last]``, ``["checkpoint", step]``, ``["print", text]``, ``["flood", bytes]``,
``["sleep", seconds]``, ``["wait_stop"]`` (until SIGTERM, then a checkpoint of step 90), ``["hang"]`` (deaf to it),
``["spawn"]`` (a grandchild in a session of its own), ``["kill", signal]``, ``["exit", code]``,
``["fail", code, text]``, ``["fail_as_a_rank", code, text]`` (another process does; this one goes on),
``["memory"]`` (raises MemoryError), ``["once", marker, steps]`` (only if the file ``marker`` is not there yet),
``["linger", seconds]`` (a thread outlives the script), ``["after_all", steps]`` (once the last word is stored).
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from erpo_core.checkpoints import manifest_files, publish
from erpo_core.errors import RunError
from erpo_core.job import JobInputs
from erpo_core.records import Checkpoint, Ended, Metrics
from workers.child.__main__ import failure_code, failure_message
from workers.child.channel import Channel
from workers.child.guard import settle_in
from workers.child.ranks import tell_failure
from workers.child.stop import StopFlag


class Script:
    def __init__(self, channel: Channel, inputs: JobInputs, stop: StopFlag) -> None:
        self.channel, self.inputs, self.stop = channel, inputs, stop
        self.epilogue: list = []

    def run(self, steps: list) -> Ended:
        for name, *arguments in steps:
            getattr(self, name)(*arguments)
            if self.stop.requested:
                return Ended("stopped")
        return Ended("succeeded")

    def metrics(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.channel.emit(Metrics(step, {"reward": step / 10}))

    def checkpoint(self, step: int) -> None:
        folder, written = self.inputs.work_dir / f"step-{step}", self.inputs.work_dir / "saving"
        written.mkdir(parents=True)
        (written / "weights.txt").write_text(str(step))
        publish(written, folder, step)
        self.channel.emit(Checkpoint(step, str(folder), manifest_files(folder)))

    def print(self, text: str) -> None:
        print(text, flush=True)

    def flood(self, size: int) -> None:
        line = b"x" * 1023 + b"\n"
        for _ in range(size // 1024):
            os.write(1, line)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def wait_stop(self) -> None:
        while not self.stop.requested:
            time.sleep(0.01)
        self.checkpoint(90)

    def hang(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)

    def spawn(self) -> None:
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        subprocess.Popen([sys.executable, "-c", code], start_new_session=True)

    def kill(self, number: int) -> None:
        time.sleep(0.3)
        os.kill(os.getpid(), number)
        time.sleep(1)

    def exit(self, code: int) -> None:
        time.sleep(0.3)
        os._exit(code)

    def fail(self, code: str, text: str) -> None:
        raise RunError(text, code=code)

    def fail_as_a_rank(self, code: str, text: str) -> None:
        if pid := os.fork():
            os.waitpid(pid, 0)
            return
        tell_failure(Ended("failed", code, text), self.inputs.work_dir)
        os._exit(0)

    def linger(self, seconds: float) -> None:
        threading.Thread(target=time.sleep, args=[seconds]).start()

    def after_all(self, steps: list) -> None:
        self.epilogue = steps

    def memory(self) -> None:
        raise MemoryError("no room for 8 EiB")

    def once(self, marker: str, steps: list) -> None:
        if not Path(marker).exists():
            Path(marker).touch()
            self.run(steps)


def script_of(spec: dict) -> list:
    """The job's own script, or what the file ``ERPO_SCRIPT`` says, for jobs that came through the API."""
    return spec.get("script") or json.loads(Path(os.environ["ERPO_SCRIPT"]).read_text())


def main(path: str) -> None:
    settle_in()
    job = json.loads(Path(path).read_text())
    stop = StopFlag()
    stop.listen()
    channel = Channel(os.environ["ERPO_RECORD_SOCKET"])
    script = Script(channel, JobInputs.from_json(job["inputs"]), stop)
    try:
        ended = script.run(script_of(job["spec"]))
    except Exception as error:
        ended = Ended("failed", failure_code(error), failure_message(error))
    channel.emit(ended)
    channel.close()
    script.run(script.epilogue)


if __name__ == "__main__":
    main(sys.argv[1])
