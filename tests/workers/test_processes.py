"""Finding and killing the processes of an attempt."""

import os
import signal
import subprocess
import sys
import time

import psutil

from workers.processes import ATTEMPT_VARIABLE, attempt_processes, kill_attempt

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(300)"
TWO = (
    "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True);"
    "print(p.pid, flush=True); p.wait()"
)


def start(mark: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", *arguments],
        env=os.environ | {ATTEMPT_VARIABLE: mark},
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )


def test_a_grandchild_in_a_session_of_its_own_is_found_by_its_mark_and_killed():
    parent = start("job_a:1", TWO, DEAF)
    grandchild = int(parent.stdout.readline())
    assert parent.stdout.readline() == "up\n"
    assert {process.pid for process in attempt_processes("job_a:1")} == {parent.pid, grandchild}
    parent.kill()
    parent.wait()
    assert {process.pid for process in attempt_processes("job_a:1")} == {grandchild}
    assert kill_attempt("job_a:1")
    assert not psutil.pid_exists(grandchild) or psutil.Process(grandchild).status() == psutil.STATUS_ZOMBIE
    parent.stdout.close()


def test_another_attempt_is_left_alone():
    mine, other = start("job_b:1", DEAF), start("job_b:11", DEAF)
    assert mine.stdout.readline() == other.stdout.readline() == "up\n"
    assert kill_attempt("job_b:1")
    assert mine.wait(5) == -signal.SIGKILL
    assert other.poll() is None
    for process in (mine, other):
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_process_without_a_mark_is_found_by_descent():
    script = (
        "import os, sys; os.environ.pop('ERPO_ATTEMPT');"
        "os.execve(sys.executable, [sys.executable, '-c', sys.argv[1]], os.environ)"
    )
    child = start("job_c:1", script, DEAF)
    assert child.stdout.readline() == "up\n"
    time.sleep(0.05)
    assert not attempt_processes("job_c:1")
    assert kill_attempt("job_c:1", root=psutil.Process(child.pid))
    assert child.wait(5) == -signal.SIGKILL
    child.stdout.close()
