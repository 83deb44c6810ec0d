"""Faults in a command that tests/launch.py starts: killed, signalled or out of space at an exact place.

The environment variable ``TICKTUNE_FAULTS`` of the command holds plans, one a word:

- ``ACTION@POINT#N``: at the N-th call, from 1, of a point. ACTION is ``KILL``, ``TERM``, ``INT``, ``HUP`` or
  ``TERM+TERM`` (signals to itself), or the name of an errno that the call raises (``ENOSPC``). POINT is the dotted name
  of a function, or ``disk``: whatever changes a file or folder below one that is named ``runs``: opening for writing,
  saving tensors and the moment after it, fsync, rename, mkdir, unlink, rmdir, chmod; or ``space``: those of them that a
  full disk can refuse.
- ``strace=INJECTION``: what strace does to system calls, such as ``fsync:signal=KILL:when=3``.
- ``trace=FILE``: every call of ``disk`` as a line of FILE: ``space`` or ``-``, what it is, its paths.
- ``args@POINT=FILE``: the first argument of each call of a function as a line of FILE.
- ``umask=027``, ``fsize=16000``: the umask, and the largest size of a file (RLIMIT_FSIZE).
- ``free=N``: the disk is said to have so many bytes free.
- ``cpu=N``, ``memory=N``: the kernel ends the process after so many seconds of computing, or refuses it more bytes than
  so many beyond those that its fork began with.
- ``fp16``: a CPU may train in fp16.
- ``stderr=FILE``, ``stdout=FILE``: where messages and results go, such as ``/dev/full``.
- ``no-exchange``: the file system cannot exchange two names.
- ``near``: what a merged folder is compared in runs in this process, not in a fresh one that imports for seconds.
"""

import contextlib
import ctypes
import errno
import importlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

VARIABLE = "TICKTUNE_FAULTS"
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate")
NEEDS_SPACE = ("open", "save", "fsync", "rename", "exchange", "mkdir")


def plan(*words: str) -> dict[str, str]:
    """The change of the environment that asks for some faults."""
    return {VARIABLE: " ".join(words)}


def install(words: Iterable[str]) -> None:
    """Puts plans into effect in this process."""
    disk = _Disk()
    for word in words:
        if word == "near":
            _near()
        elif word == "no-exchange":
            import ticktune.files

            ticktune.files._exchange = lambda one, other: False
        elif word == "fp16":
            _let_fp16()
        elif word.startswith("free="):
            _say_free(int(word.removeprefix("free=")))
        elif word.startswith("cpu="):
            seconds = int(word.removeprefix("cpu="))
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        elif word.startswith("memory="):
            _limit_memory(int(word.removeprefix("memory=")))
        elif word.startswith(("stderr=", "stdout=")):
            stream, _, file = word.partition("=")
            os.dup2(os.open(file, os.O_WRONLY), getattr(sys, stream).fileno())
        elif word.startswith("strace="):
            _trace_myself(word.removeprefix("strace="))
        elif word.startswith("umask="):
            os.umask(int(word.removeprefix("umask="), 8))
        elif word.startswith("fsize="):
            limit = int(word.removeprefix("fsize="))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        elif word.startswith("trace="):
            disk.trace = os.open(word.removeprefix("trace="), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        elif word.startswith("args@"):
            point, _, file = word.removeprefix("args@").partition("=")
            _before(point, _noting(file))
        else:
            action, _, rest = word.partition("@")
            point, _, number = rest.partition("#")
            act = _action(action)
            if point in ("disk", "space"):
                disk.plans[point, int(number)] = act
            else:
                _before(point, _at(int(number), act))
    if disk.plans or disk.trace is not None:
        disk.watch()


def _action(name: str) -> Callable[[str], None]:
    if hasattr(errno, name):
        number = getattr(errno, name)

        def fail(where: str) -> None:
            raise OSError(number, os.strerror(number), where)

        return fail
    numbers = [getattr(signal, f"SIG{part}") for part in name.split("+")]

    def send(where: str) -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return send


def can_trace() -> bool:
    """Whether strace is installed and may trace a process of ours."""
    done = (
        subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True) if shutil.which("strace") else None
    )
    return done is not None and done.returncode == 0


def _trace_myself(injection: str) -> None:
    pid, calls = str(os.getpid()), injection.partition(":")[0]
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER: anybody may trace it
    words = ["strace", "-f", "-o", "/dev/null", "-e", f"trace={calls}", "-e", f"inject={injection}", "-p", pid]
    subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True)
    while "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
        time.sleep(0.01)


def _near() -> None:
    from ticktune.export import stock_forward, verify

    def run(words: list[str], **options: object) -> "subprocess.CompletedProcess[str]":
        with contextlib.redirect_stdout(io.StringIO()) as output:
            stock_forward.main(words[-1])
        lines = [json.dumps(json.loads(line) | {"ticktune": []}) for line in output.getvalue().splitlines()]
        return subprocess.CompletedProcess(words, 0, "\n".join(lines), "")

    verify.subprocess = SimpleNamespace(run=run)  # type: ignore[assignment]


def _say_free(count: int) -> None:
    shutil.disk_usage = lambda path: SimpleNamespace(free=count)  # type: ignore[assignment,misc]


def _let_fp16() -> None:
    import ticktune.prepare
    from ticktune.device import Compute

    choose = ticktune.prepare.choose_compute

    def chosen(device: str, precision: str, **named: Any) -> Compute:
        compute = choose(device, "fp32" if precision == "fp16" else precision, **named)
        return Compute(compute.device, "fp16") if precision == "fp16" else compute

    ticktune.prepare.choose_compute = chosen


def _limit_memory(size: int) -> None:
    status = Path("/proc/self/status").read_text()
    held = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (held * 1024 + size,) * 2)


def _at(number: int, act: Callable[[str], None]) -> Callable[..., None]:
    calls = 0

    def count(*args: object, **options: object) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            act("")

    return count


def _noting(file: str) -> Callable[..., None]:
    number = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(first: object, *args: object, **options: object) -> None:
        os.write(number, f"{first}\n".encode())

    return note


def _before(point: str, do: Callable[..., None]) -> None:
    """Calls ``do`` with the arguments of every call of a function, before it."""
    owner, name = _find(point)
    inner = getattr(owner, name)

    def outer(*args: Any, **options: Any) -> Any:
        do(*args, **options)
        return inner(*args, **options)

    setattr(owner, name, outer)


def _find(point: str) -> tuple[Any, str]:
    *parts, name = point.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            owner = getattr(owner, part)
        return owner, name
    raise ValueError(f"no such function: {point}")


class _Disk:
    def __init__(self) -> None:
        self.plans: dict[tuple[str, int], Callable[[str], None]] = {}
        self.trace: int | None = None
        self._calls = {"disk": 0, "space": 0}

    def watch(self) -> None:
        """Hooks what Python does to files, and what safetensors and fsync do without its knowledge."""
        import safetensors.torch
        import transformers.modeling_utils

        import ticktune.files

        sys.addaudithook(self._audit)
        fsync, save_file = os.fsync, safetensors.torch.save_file

        def watched_fsync(number: int) -> None:
            self._call("fsync", os.readlink(f"/proc/self/fd/{number}"))
            fsync(number)

        def watched_save(tensors: Any, filename: Any, metadata: Any = None) -> None:
            self._call("save", filename)
            try:
                save_file(tensors, filename, metadata)
            finally:
                self._call("saved", filename)

        def watched_exchange(one: Path, other: Path) -> bool:
            self._call("exchange", one, other)
            return exchange(one, other)

        exchange = ticktune.files._exchange
        os.fsync = watched_fsync
        safetensors.torch.save_file = watched_save
        transformers.modeling_utils.safe_save_file = watched_save
        ticktune.files._exchange = watched_exchange

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str | bytes | os.PathLike) and args[2] & _WRITING:
            self._call("open", args[0])
        elif event == "os.rename":
            self._call("rename", _whole(args[0], args[2]), _whole(args[1], args[3]))
        elif event in _EVENTS:
            self._call(event.removeprefix("os."), _whole(args[0], args[-1]))

    def _call(self, kind: str, *paths: Any) -> None:
        names = [os.fsdecode(path) for path in paths if isinstance(path, str | bytes | os.PathLike)]
        if kind == "mkdir" and os.path.isdir(names[0]):
            kind = "mkdir of a folder that exists"
        if not any("runs" in Path(os.path.abspath(name)).parts for name in names):
            return
        if self.trace is not None:
            needs = "space" if kind in NEEDS_SPACE else "-"
            os.write(self.trace, "\t".join([needs, kind, *map(os.path.abspath, names), "\n"]).encode())
        for point in ("disk", "space") if kind in NEEDS_SPACE else ("disk",):
            self._calls[point] += 1
            act = self.plans.get((point, self._calls[point]))
            if act is not None:
                act(names[0])


def _whole(path: Any, folder: Any) -> Any:
    """A path that may be relative to an open folder."""
    is_open = isinstance(folder, int) and folder >= 0 and isinstance(path, str | bytes | os.PathLike)
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path)) if is_open else path
