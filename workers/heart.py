"""The heartbeat of an attempt: renews the lease and the child's permit, and hears what the user wants."""

import logging
import threading
from collections.abc import Callable

from erpo_core.errors import FencedError
from service.settings import Settings
from workers.claims import Attempt
from workers.processes import boottime

log = logging.getLogger(__name__)
_LOOK_SECONDS = 0.5


def lease_margin(lease_seconds: float) -> float:
    """How much earlier than the lease a permit ends, and how much later a sweeper calls it expired."""
    return min(5.0, lease_seconds / 5)


class Heart:
    """A thread. ``wanted`` is the last desired status; ``lost`` says that the attempt may not go on."""

    def __init__(self, attempt: Attempt, settings: Settings, on_permit: Callable[[float], None]) -> None:
        self.wanted: str | None = None
        self.lost = False
        self._attempt = attempt
        self._settings = settings
        self._on_permit = on_permit
        self._permit = boottime() + settings.lease_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)

    def __enter__(self) -> "Heart":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join(5)

    def _run(self) -> None:
        next_beat = 0.0
        while not self._stop.is_set():
            try:
                if boottime() >= next_beat:
                    self._beat()
                    next_beat = boottime() + self._settings.heartbeat_seconds
                else:
                    self.wanted = self._attempt.desired()
            except FencedError as error:
                log.warning("%s: lost: %s", self._attempt.mark, error.message)
                self.lost = True
                return
            except ConnectionError as error:
                log.warning("%s: no heartbeat: %s", self._attempt.mark, error)
            except Exception:
                # A broken heart must not leave a child alive for ever: its permit ends by itself.
                log.exception("%s: heartbeat", self._attempt.mark)
            self.lost = self.lost or boottime() > self._permit
            self._stop.wait(min(_LOOK_SECONDS, self._settings.heartbeat_seconds))

    def _beat(self) -> None:
        sent = boottime()
        self.wanted = self._attempt.heartbeat()
        self._permit = sent + self._settings.lease_seconds - lease_margin(self._settings.lease_seconds)
        self._on_permit(self._permit)
