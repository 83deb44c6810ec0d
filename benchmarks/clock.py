"""Times and memory of calls on a GPU or a CPU, and for how long a benchmark may go on."""

import gc
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from ticktune.device import Compute, describe
from ticktune.versions import versions

PEERS = ("peft", "accelerate", "liger-kernel", "triton")
_CLOCKS = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")


class Clock:
    """Seconds between two points: of events on the device's own stream where there is CUDA, else of the wall.

    Args:
        device: Where what is timed runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begun: Any = None

    def start(self) -> None:
        """The first point."""
        self._begun = self._now()

    def stop(self) -> float:
        """Seconds since the first point, once all of it is done."""
        end = self._now()
        if not self._cuda:
            return float(end - self._begun)
        end.synchronize()
        return float(self._begun.elapsed_time(end)) / 1000

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Budget:
    """Seconds that are left of those a benchmark may take.

    Args:
        seconds: In all, from now on.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._begun = time.monotonic()

    @property
    def used(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._begun

    @property
    def left(self) -> float:
        """Seconds until the end; negative behind it."""
        return self.seconds - self.used

    def allows(self, seconds: float, what: str, left_out: list[dict[str, str]]) -> bool:
        """Whether so many seconds are left; notes what is left out if not."""
        if self.left >= seconds:
            return True
        left_out.append({"what": what, "why": f"the budget of {self.seconds:.0f} s is used up"})
        return False


def in_turns(
    calls: dict[str, Callable[[], Any]], device: torch.device, *, warm: int, times: int, repeat: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call in each round; who begins changes from round to round.

    Args:
        calls: What is timed.
        device: Where it runs.
        warm: Rounds before those that count.
        times: Rounds that count.
        repeat: Calls between two points of the clock, for what is shorter than what the clock itself takes.
    """
    names, clock = list(calls), Clock(device)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warm, times):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            clock.start()
            for _ in range(repeat):
                calls[name]()
            taken = clock.stop() / repeat
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, 10th and 90th percentile in milliseconds, and of how many."""
    low, high = (float(q) for q in np.percentile(seconds, (10, 90)))
    return {
        "ms": round(1000 * statistics.median(seconds), 4),
        "ms_p10": round(1000 * low, 4),
        "ms_p90": round(1000 * high, 4),
        "times": len(seconds),
    }


class Memory:
    """The most that a device's allocator holds; on a CPU nothing is known of it.

    Args:
        device: Where.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"

    @property
    def held(self) -> int:
        """Bytes of living tensors."""
        return torch.cuda.memory_allocated(self._device) if self._cuda else 0

    def rise(self, run: Callable[[], Any]) -> tuple[int, int] | None:
        """By how many bytes a call raises what is allocated, and what is reserved, over what is allocated before."""
        if not self._cuda:
            run()
            return None
        self.forget()
        torch.cuda.reset_peak_memory_stats(self._device)
        held, reserved = self.held, torch.cuda.memory_reserved(self._device)
        run()
        return (
            torch.cuda.max_memory_allocated(self._device) - held,
            torch.cuda.max_memory_reserved(self._device) - reserved,
        )

    def forget(self) -> None:
        """Gives back what nothing refers to any more."""
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()


def machine(compute: Compute) -> dict[str, Any]:
    """Facts of the device, with what nvidia-smi says of its clocks now."""
    found = describe(compute)
    if compute.device.type == "cuda":
        facts = torch.cuda.get_device_properties(compute.device)
        found |= {"memory_bytes": facts.total_memory, "multiprocessors": facts.multi_processor_count}
        found["clocks"] = clocks()
    return found


def clocks() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU, in its own units (MHz, W, degrees Celsius); None: it is not there."""
    words = ["nvidia-smi", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(_CLOCKS, (value.strip() for value in done.stdout.split(",")), strict=False))


def all_versions() -> dict[str, str]:
    """Versions of ticktune, of what it stands on, and of the tools it is compared with."""
    found = versions()
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def go_on(document: dict[str, Any], **facts: Any) -> None:
    """Writes what results depend on into their document; those of another machine or setting are not gone on with.

    Raises:
        SystemExit: The document has results, and something is not as it was.
    """
    for name, value in facts.items():
        if document.get(name, value) != value:
            raise SystemExit(f"these results are of other {name}: {document[name]}, now {value}; name other --results")
    document |= facts
