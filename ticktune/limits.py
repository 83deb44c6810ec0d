"""Limits for what somebody else wrote and this process computes, such as a chat template."""

import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType


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
