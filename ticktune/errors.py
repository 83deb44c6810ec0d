"""The errors that a user may meet; each class knows its kind and its exit code."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Args:
        message: What was found and what was expected.
        where: File, line and column, recipe key, or whatever names the place; may be empty.
        fix: What to do about it; may be empty.
    """

    message: str
    where: str = ""
    fix: str = ""


def first_line(error: BaseException) -> str:
    """What an error of another library says in short; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class TicktuneError(Exception):
    """Base of all errors that are not bugs: one or several problems and an exit code."""

    kind = "error"
    exit_code = 1

    def __init__(self, message: str | list[Problem], *, where: str = "", fix: str = "") -> None:
        self.problems = [Problem(message, where, fix)] if isinstance(message, str) else message
        super().__init__("\n".join(f"{p.where}: {p.message}" if p.where else p.message for p in self.problems))


class RecipeError(TicktuneError):
    """A recipe or command line that cannot be obeyed; also a device or precision that is not there."""

    kind = "recipe"
    exit_code = 2


class UsageError(TicktuneError):
    """A command line that does not name something that exists."""

    kind = "usage"
    exit_code = 2


class BaseModelError(TicktuneError):
    """The base model is unknown, unreachable, damaged, or not the one that was asked for."""

    kind = "base"
    exit_code = 3


class PatchError(BaseModelError):
    """The base model has no place for what was asked: no known FFN, no such layer, no such norm."""

    kind = "patch"


class DataError(TicktuneError):
    """A data file or row that cannot be used."""

    kind = "data"
    exit_code = 4


class NumericsError(TicktuneError):
    """A loss or gradient that is not finite."""

    kind = "numerics"
    exit_code = 5


class CheckpointError(TicktuneError):
    """A checkpoint or adapter that is damaged, incomplete, or from another base."""

    kind = "checkpoint"
    exit_code = 6


class ExportError(TicktuneError):
    """An export that is impossible for this architecture or failed its verification."""

    kind = "export"
    exit_code = 6


class OutputError(TicktuneError):
    """The output directory is busy, exists already, or belongs to another recipe."""

    kind = "output"
    exit_code = 7


class ResourceError(TicktuneError):
    """Out of disk or memory, or an output that cannot be written."""

    kind = "resources"
    exit_code = 8


class MinimumMissed(TicktuneError):
    """A metric is below the ``--min``, or above the ``--max``, that was asked for."""

    kind = "minimum"
    exit_code = 9


class ReaderGone(TicktuneError):
    """Whoever read our standard output has closed it; said to nobody."""

    kind = "pipe"
    exit_code = 141


class Interrupted(TicktuneError):
    """A signal arrived; the state was saved first. The exit code is 128 + the signal's number."""

    kind = "interrupted"

    def __init__(self, message: str, *, signal_number: int, fix: str = "") -> None:
        super().__init__(message, fix=fix)
        self.exit_code = 128 + signal_number
