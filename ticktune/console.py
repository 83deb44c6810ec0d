"""The only place that prints: results to stdout, everything else to stderr, text from outside escaped."""

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TextIO

from ticktune.errors import ReaderGone, ResourceError, TicktuneError
from ticktune.files import finite

# C0 and C1 controls and the bidirectional overrides: a terminal would obey them.
_CONTROLS = {c: f"\\x{c:02x}" for c in (*range(0x20), 0x7F, *range(0x80, 0xA0))}
_CONTROLS |= {c: f"\\u{c:04x}" for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029)}
_JSON_CONTROLS = {c: f"\\u{c:04x}" for c in _CONTROLS if c >= 0x7F}  # json.dumps escapes the others itself


def clean(text: object) -> str:
    """Returns ``text`` with control and bidirectional characters made visible, newline included."""
    return str(text).translate(_CONTROLS)


def clean_lines(text: str) -> str:
    """Like :func:`clean`, but line ends stay."""
    return "\n".join(clean(line) for line in text.split("\n"))


class Console:
    """Prints for one command.

    Args:
        quiet: No progress and no notes; warnings and errors are still printed.
        as_json: Results as one JSON document even on a terminal.
    """

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self.quiet = quiet
        self.json = as_json or not sys.stdout.isatty()

    def note(self, text: str) -> None:
        """A line for the person who waits; to stderr, not under ``--quiet``."""
        if not self.quiet:
            _write(sys.stderr, clean_lines(text))

    def warn(self, text: str) -> None:
        """A line that must be seen; to stderr."""
        _write(sys.stderr, f"warning: {clean_lines(text)}")

    def error(self, error: TicktuneError) -> None:
        """Every problem of an error, each with its place and its fix; to stderr."""
        for problem in error.problems:
            where = f"{clean(problem.where)}: " if problem.where else ""
            _write(sys.stderr, f"error[{error.kind}]: {where}{clean_lines(problem.message)}")
            if problem.fix:
                _write(sys.stderr, f"  fix: {clean_lines(problem.fix)}")

    def traceback(self) -> None:
        """The traceback of the error that is being handled; to stderr."""
        import traceback

        _write(sys.stderr, clean_lines(traceback.format_exc().rstrip()))

    def result(
        self,
        document: dict[str, Any],
        rows: Sequence[Sequence[str]],
        title: str = "",
        more: Sequence[tuple[str, Sequence[Sequence[str]]]] = (),
    ) -> None:
        """The answer of a command: a JSON document when piped or asked for, else a table.

        Args:
            document: What a program reads.
            rows: What a person reads, one row of cells each; the first row holds the headings.
            title: A line above the table.
            more: Titles and rows of further tables.
        """
        if self.json:
            _write(sys.stdout, _json(document))
            return
        for heading, body in ((title, rows), *more):
            self.table(body, heading)

    def line(self, document: dict[str, Any], text: str) -> None:
        """One of many answers: a JSON object a line when piped, else ``text``."""
        _write(sys.stdout, _json(document) if self.json else clean_lines(text))

    def text(self, text: str) -> None:
        """Text for stdout as it is (a schema, a shell snippet)."""
        _write(sys.stdout, text)

    def table(self, rows: Sequence[Sequence[str]], title: str = "") -> None:
        """A table on stdout."""
        from rich import box
        from rich.console import Console as RichConsole
        from rich.table import Table
        from rich.text import Text

        head, *body = rows
        console = RichConsole(file=sys.stdout, highlight=False, markup=False, emoji=False)
        table = Table(box=box.SIMPLE_HEAD)
        cells = [[clean_lines(cell) for cell in row] for row in rows]
        for cell, width in zip(head, _widths(cells, console.width - 3 * len(head) - 1), strict=True):
            table.add_column(Text(clean(cell)), overflow="fold", width=width)
        for row in body:
            table.add_row(*(Text(clean_lines(cell)) for cell in row))
        # A title of the table's own would be wrapped to the table's width.
        console.print(*([Text(clean(title))] if title else []), table, sep="\n")

    def progress(self, total: int, start: int = 0) -> "Progress":
        """A progress display over optimizer steps, on stderr."""
        return Progress(total, start, live=sys.stderr.isatty() and not self.quiet, quiet=self.quiet)


class Progress(AbstractContextManager["Progress"]):
    """A bar on a terminal; plain lines, at most one in ten seconds, elsewhere."""

    _seconds_between_lines = 10.0

    def __init__(self, total: int, start: int, *, live: bool, quiet: bool) -> None:
        self.total = total
        self.quiet = quiet
        self._last_line = 0.0
        self._bar: Any = None
        if live:
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
                TimeRemainingColumn(),
                console=RichConsole(stderr=True, highlight=False, markup=False, emoji=False),
                transient=False,
            )
            self._task = self._bar.add_task("training", total=total, completed=start, figures="")

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, step: int, figures: str, seconds_left: float) -> None:
        """Shows that ``step`` optimizer steps are done.

        Args:
            step: Steps done, of ``total``.
            figures: Loss, learning rate and rows per second as text.
            seconds_left: Estimated time left; used where there is no bar.
        """
        if self._bar:
            self._bar.update(self._task, completed=step, figures=figures)
        elif not self.quiet and (
            step == self.total or time.monotonic() - self._last_line >= self._seconds_between_lines
        ):
            self._last_line = time.monotonic()
            _write(sys.stderr, f"step {step}/{self.total}  {figures}  {duration(seconds_left)} left")

    def note(self, text: str) -> None:
        """A line above the bar."""
        if self._bar:
            from rich.text import Text

            self._bar.console.print(Text(clean_lines(text)))
        elif not self.quiet:
            _write(sys.stderr, clean_lines(text))


def duration(seconds: float) -> str:
    """Seconds as ``45s``, ``3m05s`` or ``2h10m``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def figure(value: float) -> str:
    """A number for a table: four significant digits, no exponent where it can be helped."""
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e3 or value == 0 else f"{value:.4g}"


def size_text(count: int) -> str:
    """A number of bytes for a person, in kB, MB or GB."""
    unit, name = next(((10**n, name) for n, name in ((9, "GB"), (6, "MB")) if count >= 10**n), (1000, "kB"))
    return f"{count / unit:.1f} {name}"


def table_of(figures: Iterable[tuple[str, float]]) -> list[list[str]]:
    """Rows of a two-column table of named figures."""
    return [["metric", "value"], *([name, figure(value)] for name, value in figures)]


def _widths(rows: Sequence[Sequence[str]], room: int) -> list[int | None]:
    """Widths of the columns of a table that is too wide: no word is broken, such as the name of a config field.

    None leaves a column to rich, which knows nothing of words: where all fit, or not even the longest words do.
    """
    from rich.cells import cell_len

    columns = list(zip(*rows, strict=True))
    wanted = [max(cell_len(line) for cell in column for line in cell.split("\n")) for column in columns]
    words = [max((cell_len(word) for cell in column for word in cell.split()), default=0) for column in columns]
    if sum(wanted) <= room or sum(words) > room:
        return [None] * len(columns)
    while sum(wanted) > room:
        widest = max(range(len(columns)), key=lambda i: wanted[i] if wanted[i] > words[i] else 0)
        wanted[widest] -= 1
    return list(wanted)


def _json(document: dict[str, Any]) -> str:
    return json.dumps(finite(document), ensure_ascii=False, allow_nan=False).translate(_JSON_CONTROLS)


def _write(stream: TextIO, text: str) -> None:
    # A terminal that cannot show a character (LC_ALL=C) gets its escape, never a UnicodeEncodeError.
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except BrokenPipeError:
        _silence(stream)
        raise ReaderGone("the reader of the output is gone") from None
    except OSError as error:
        _silence(stream)
        if stream is not sys.stderr:  # on stderr, a closed terminal or a full disk costs messages, not the work
            raise ResourceError(f"it cannot be written: {error.strerror}", where="standard output") from error


def _silence(stream: TextIO) -> None:
    """Sends a stream nowhere: what is still buffered must not fail again when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
