"""Signals that ask to stop: a handler sets a flag, and the work polls it at safe points."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
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
