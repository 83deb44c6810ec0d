"""The command line in processes of its own that begin with their imports done.

Importing torch and transformers takes longer than most commands on tiny models. A server process (that of
``multiprocessing``) imports them once and computes nothing; each command runs in a fork of it: the real entry point,
with arguments, environment, directory and file descriptors of its own, that signals stop as they stop any process.
"""

import contextlib
import functools
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import TracebackType
from typing import Self

_ROOT = Path(__file__).parents[1]


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before:
            os.environ["PYTHONPATH"] = before
    return context


class Launched:
    """A command that runs, as ``subprocess.Popen`` has it.

    Args:
        words: Of the command line.
        cwd: Where it runs.
        env: Changes of the environment.
        input: What it reads from standard input.
    """

    def __init__(
        self,
        words: list[str],
        cwd: Path,
        env: Mapping[str, str] | None = None,
        input: str | bytes = b"",
    ) -> None:
        self.words = words
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [Path(self._folder.name) / name for name in ("input", "output", "error")]
        for stream in self._streams:
            stream.write_bytes(input.encode() if isinstance(input, str) else input)
            input = b""
        environment = {**os.environ, **(env or {})}
        self._used = Path(self._folder.name) / "used"
        self._process = _context().Process(target=_run, args=(words, cwd, environment, self._streams, self._used))
        self._process.start()
        self.pid = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Sends it a signal, if it runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end.

        Raises:
            subprocess.TimeoutExpired: It runs longer than ``timeout`` seconds.
        """
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self.words, timeout or 0)
        return code

    def text(self, number: int) -> str:
        """What it has written so far: 1, standard output; 2, standard error."""
        return self._streams[number].read_text(encoding="utf-8", errors="replace")

    @property
    def seconds(self) -> float:
        """How long it ran, once it has ended by itself."""
        return float(self._used.read_text())

    def completed(self, timeout: float | None = None) -> "subprocess.CompletedProcess[str]":
        """Waits for its end and returns what it wrote."""
        code = self.wait(timeout)
        return subprocess.CompletedProcess(self.words, code, self.text(1), self.text(2))

    def close(self) -> None:
        """Ends it, if it runs."""
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        self._process.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def launch(
    *words: object, cwd: Path, env: Mapping[str, str] | None = None, input: str | bytes = b"", timeout: float = 600
) -> "subprocess.CompletedProcess[str]":  # fmt: skip
    """Runs a command to its end."""
    with Launched([str(word) for word in words], cwd, env, input) as launched:
        return launched.completed(timeout)


def _run(words: list[str], cwd: Path, environment: dict[str, str], streams: list[Path], used: Path) -> None:
    started = time.monotonic()
    for number, stream in enumerate(streams):
        os.dup2(os.open(stream, os.O_RDWR | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    for name, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, open(number, "w", encoding="utf-8", buffering=1, closefd=False))
    import torch

    from tests.reliability import faults
    from ticktune.cli import entry

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    faults.install(environment.get(faults.VARIABLE, "").split())
    code = 70
    try:
        code = entry(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        used.write_text(str(time.monotonic() - started))
        os._exit(code)
