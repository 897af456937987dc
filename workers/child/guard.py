"""No process of an attempt outlives its supervisor, whatever dies first and however stuck the rest is.

The child is killed with its supervisor by the kernel. What the child itself has started would then be left; so a small
process that does nothing else waits for the child's end and kills what carries the attempt's mark.
"""

import os
import signal
import sys

from workers.processes import ATTEMPT_VARIABLE, die_with_parent, kill_attempt

SUPERVISOR_VARIABLE = "ERPO_SUPERVISOR_PID"


def settle_in() -> None:
    """First thing in a child, while it has one thread: be killed with the supervisor, and leave nothing behind."""
    follow_parent()
    if mark := os.environ.get(ATTEMPT_VARIABLE):
        _start_guard(mark)


def follow_parent() -> None:
    """Be killed with the process that has started this one."""
    die_with_parent()
    expected = os.environ.get(SUPERVISOR_VARIABLE)
    if expected and os.getppid() != int(expected):
        sys.exit("erpo: the supervisor is gone")


def _start_guard(mark: str) -> None:
    child = os.getpid()
    if os.fork():
        return
    os.setsid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silence, descriptor)
    die_with_parent(signal.SIGUSR2)
    if os.getppid() == child:
        signal.sigwait({signal.SIGUSR2})
    kill_attempt(mark)
    os._exit(0)
