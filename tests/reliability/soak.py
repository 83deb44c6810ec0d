"""Every fault of test_crash.py at every place: ``python -m tests.reliability.soak [--only KIND]…``.

A run with dropout, micro-batches, evaluations and an odd last batch is killed, signalled and robbed of its disk; the
same command again must end with the same adapter, optimizer state, evaluations and log, and no folder may be
half-written. Writes ``benchmarks/results/faults.json``.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.reliability.faults import can_trace
from tests.reliability.runs import STEPS, Work, again, broken, hashes, judged, leftovers, result, small_work, tried
from ticktune.files import write_json
from ticktune.versions import versions

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "faults.json"
SEED = 1
RANDOM, PAIRS, TRACED = 50, 50, 5
_ALIKE = (4, 8, 10)
"""Checkpoints whose saves are like that of step 6: the first, that one and the last are tried call by call."""
_FORCED = ("--merge", "--force", "--dtype", "bfloat16")


class Soak:
    """The faults by kind; each attempt yields what is wrong, nothing where all is well.

    Args:
        work: The recipe; its run ``whole`` is finished and merged.
    """

    def __init__(self, work: Work) -> None:
        self.work, self.draw = work, random.Random(SEED)
        assert work.train("whole").returncode == 0
        trace = work.folder / "trace"  # of a second run: the first makes the folder of runs too
        started = time.monotonic()
        done = work.train("timed", f"trace={trace}")
        assert done.returncode == 0, done.stderr
        self.seconds = time.monotonic() - started
        self.whole = result(work.run("whole"))
        self.calls = _numbered(trace)
        assert work.export("whole", "--merge").returncode == 0
        trace = work.folder / "export-trace"
        work.copy("whole", "traced")
        assert work.export("traced", *_FORCED, plans=(f"trace={trace}",)).returncode == 0
        self.export_calls = _numbered(trace)

    def kinds(self) -> dict[str, Callable[[], Iterator[str]]]:
        """Kind of fault -> its attempts."""
        return {
            "SIGKILL after every step": lambda: self._train(
                "KILL@ticktune.session.Session._show#{}", range(1, STEPS + 1), -9
            ),
            "SIGKILL in every micro-batch": lambda: self._train(
                "KILL@ticktune.train.steps._backward#{}", range(1, 2 * STEPS + 1), -9
            ),
            "SIGKILL at random instants": lambda: self._random([signal.SIGKILL] * RANDOM),
            "SIGTERM, SIGINT and SIGHUP at random instants": lambda: self._random(
                [signal.SIGTERM, signal.SIGINT, signal.SIGHUP] * 4
            ),
            "SIGKILL at every change of the disk while training": lambda: self._train(
                "KILL@disk#{}", self.calls["disk"], -9
            ),
            "full disk at every change of the disk while training": lambda: self._train(
                "ENOSPC@space#{}", self.calls["space"], 8
            ),
            "files that cannot grow (RLIMIT_FSIZE)": lambda: self._train("fsize={}00", range(4, 40, 3), 8),
            "SIGKILL at every change of the disk while exporting": lambda: self._export("KILL@disk#{}", "disk", -9),
            "full disk at every change of the disk while exporting": lambda: self._export(
                "ENOSPC@space#{}", "space", 8
            ),
            "SIGKILL within system calls (strace)": lambda: self._traced("signal=KILL", -9),
            "full disk in system calls (strace)": lambda: self._traced("error=ENOSPC", 8),
            "two processes at once": self._pairs,
        }

    def _train(self, plan: str, numbers: Iterable[int], code: int) -> Iterator[str]:
        for number in numbers:
            yield tried(self.work, f"train-{number}", self.whole, plan.format(number), code=code)

    def _random(self, numbers: list[signal.Signals]) -> Iterator[str]:
        for attempt, number in enumerate(numbers):
            name, wait = f"random-{attempt}", self.draw.uniform(0, self.seconds)
            with self.work.training(name) as process:
                time.sleep(wait)
                process.send_signal(number)
                code, error = process.wait(), process.text(2)
            # Before its handlers are there, a signal ends it as it ends any process; when it is done it comes too late.
            allowed = (0, -number, -9 if number == signal.SIGKILL else 128 + number)
            wrong = judged(self.work, name, code, error, code=code if code in allowed else allowed[-1])
            yield wrong or again(self.work, name, self.whole)
            self.work.remove(name)

    def _export(self, plan: str, kind: str, code: int) -> Iterator[str]:
        before = hashes(self.work.run("whole") / "merged")
        for number in self.export_calls[kind]:
            name = f"export-{number}"
            run = self.work.copy("whole", name)
            done = self.work.export(name, *_FORCED, plans=(plan.format(number),))
            yield self._after_export(run, before, done.returncode, done.stderr, code)
            self.work.remove(name)

    def _after_export(self, run: Path, before: dict[str, str], found: int, error: str, code: int) -> str:
        if wrong := judged(self.work, run.name, found, error, code=code):
            return wrong
        is_new = _dtype(run) == "bfloat16"
        if not is_new and hashes(run / "merged") != before:
            return "the old export has changed"
        done = self.work.export(run.name, *_FORCED)
        if done.returncode != 0 or _dtype(run) != "bfloat16" or broken(run) or leftovers(run):
            return f"exported again: {done.returncode}, {broken(run)}, {leftovers(run)}: {done.stderr}"
        return ""

    def _traced(self, fault: str, code: int) -> Iterator[str]:
        if not can_trace():
            return
        calls = ["write", "fsync", "rename", "mkdir", "unlink", "unlinkat"]
        for call in calls if code == -9 else calls[:4]:
            for number in range(1, TRACED + 1):
                name = f"traced-{call}-{number}"
                when = number * 5 if call in ("write", "fsync") else number
                first = self.work.train(name, f"strace={call}:{fault}:when={when}", words=("--quiet",))
                if first.returncode == 0:  # fewer calls than that, or one whose failure costs nothing
                    self.work.remove(name)
                    break
                yield judged(self.work, name, first.returncode, first.stderr, code=code) or again(
                    self.work, name, self.whole
                )
                self.work.remove(name)

    def _pairs(self) -> Iterator[str]:
        for attempt in range(PAIRS):
            name = f"pair-{attempt}"
            with self.work.training(name) as one, self.work.training(name) as other:
                codes = sorted([one.wait(), other.wait()])
                winner, loser = (one, other) if one.returncode == 0 else (other, one)
                said, named = loser.text(2), f"another process is working in this directory (pid {winner.pid} on "
            if codes != [0, 7]:
                yield f"exit codes {codes}"
            elif named not in said:
                yield f"the holder is not named: {said}"
            else:
                yield again(self.work, name, self.whole)
            self.work.remove(name)


def _numbered(trace: Path) -> dict[str, list[int]]:
    """The numbers of the calls of ``disk`` and ``space``, without those of saves that are like another one."""
    numbers: dict[str, list[int]] = {"disk": [], "space": []}
    space = 0
    for number, line in enumerate(trace.read_text().splitlines(), start=1):
        space += line.startswith("space")
        if not any(f"step-{step:08d}-" in line for step in _ALIKE):
            numbers["disk"].append(number)
            if line.startswith("space"):
                numbers["space"].append(space)
    return numbers


def _dtype(run: Path) -> str:
    return str(json.loads((run / "merged/ticktune.json").read_text())["dtype"])


def main() -> int:
    """Runs all kinds, or those that are named, and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", help="part of a kind's name")
    only = parser.parse_args().only
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        soak = Soak(small_work(Path(folder) / "work"))
        for kind, attempts in soak.kinds().items():
            if only and not any(part in kind for part in only):
                continue
            started = time.monotonic()
            wrong = list(attempts())
            bad = [text for text in wrong if text]
            found[kind] = {"tried": len(wrong), "survived": len(wrong) - len(bad)}
            sys.stdout.write(f"{kind}: {found[kind]} in {time.monotonic() - started:.0f} s\n")
            sys.stdout.writelines(f"  {text}\n" for text in bad)
            sys.stdout.flush()
            if not only:
                write_json(RESULT, _document(found))
    return 1 if any(kind["tried"] > kind["survived"] for kind in found.values()) else 0


def _document(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "command": "bash scripts/soak.sh",
        "seed": SEED,
        "steps": STEPS,
        "strace": can_trace(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "tried": sum(kind["tried"] for kind in found.values()),
        "survived": sum(kind["survived"] for kind in found.values()),
        "faults": found,
    }


if __name__ == "__main__":
    sys.exit(main())
