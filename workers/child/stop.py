"""How a child is asked to leave: SIGTERM sets a flag that the work reads between steps."""

import signal
import threading


class StopFlag:
    """Satisfies :class:`erpo_core.job.Stop`."""

    def __init__(self) -> None:
        self._event = threading.Event()

    @property
    def requested(self) -> bool:
        """Has somebody asked the job to write a checkpoint and leave?"""
        return self._event.is_set()

    def request(self) -> None:
        """Ask."""
        self._event.set()

    def listen(self) -> None:
        """Ask on SIGTERM. SIGINT is ignored: Ctrl-C in a terminal is the supervisor's business."""
        signal.signal(signal.SIGTERM, lambda *_: self.request())
        signal.signal(signal.SIGINT, signal.SIG_IGN)
