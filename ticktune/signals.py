"""Signals that ask to stop: a handler sets a flag, and the work polls it at safe points; limits for work of others."""

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopAsked(BaseException):
    """Raised by :meth:`Signals.poll` after a signal; whoever owns the state saves it on the way out.

    Args:
        number: The signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """Remembers the first signal; a second one ends the process at once."""

    def __init__(self) -> None:
        self._asked = 0

    def poll(self) -> None:
        """Raises :class:`StopAsked` when a signal has come."""
        if self._asked:
            raise StopAsked(self._asked)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked = number
        for other in _NUMBERS:
            signal.signal(other, signal.SIG_DFL)


@contextmanager
def watched_signals() -> Iterator[Signals]:
    """Handles SIGINT, SIGTERM and SIGHUP for the block."""
    signals = Signals()
    before = {number: signal.signal(number, signals._handle) for number in _NUMBERS}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def limited(seconds: float, more_bytes: int) -> Iterator[None]:
    """Limits what a block computes that somebody else wrote.

    Args:
        seconds: Of computing; other threads than the main one, which takes no signals, are not limited so.
        more_bytes: Of memory, on top of what the process has; not limited where there is no ``/proc``.

    Raises:
        TimeoutError: It computes longer.
        MemoryError: It asks for more.
    """
    with ExitStack() as undo:
        if (sizes := Path("/proc/self/statm")).exists():
            soft, hard = resource.getrlimit(resource.RLIMIT_AS)
            most = int(sizes.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + more_bytes
            if soft == resource.RLIM_INFINITY or most < soft:
                resource.setrlimit(resource.RLIMIT_AS, (most, hard))
                undo.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
        if threading.current_thread() is threading.main_thread():
            undo.callback(signal.signal, signal.SIGVTALRM, signal.signal(signal.SIGVTALRM, _time_over))
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
            undo.callback(signal.setitimer, signal.ITIMER_VIRTUAL, 0)
        yield


def _time_over(number: int, frame: FrameType | None) -> None:
    raise TimeoutError("it computes for too long")
