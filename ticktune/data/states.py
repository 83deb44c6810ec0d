"""Hidden states of examples, kept in memory or in a file without a name that is mapped into memory."""

import mmap
import shutil
import tempfile
from collections.abc import Sequence
from typing import IO, Literal

import torch
from torch import Tensor

from ticktune.console import size_text
from ticktune.data.store import cache_directory
from ticktune.errors import ResourceError

LIMIT = 4 * 1024**3
"""Bytes that hidden states may take in memory."""


class States:
    """Tensors by the number of an example; all are added, then sealed, then taken.

    The file never has a name, so that nothing is left of it however the process ends.

    Args:
        kind: Where they are kept.
        size: How many bytes will be added, about.

    Raises:
        ResourceError: There is no room for so many bytes.
    """

    def __init__(self, kind: Literal["memory", "disk"], size: int) -> None:
        self._parts: list[Tensor] = []  # (tokens, hidden) each
        self._places: dict[int, tuple[int, int, int]] = {}  # number -> part, first token, end
        self._shapes: list[tuple[torch.dtype, torch.Size]] = []  # of the parts in the file
        self._file: IO[bytes] | None = None
        if kind == "memory":
            if size > LIMIT:
                raise ResourceError(
                    f"the hidden states of all rows take {size_text(size)}, and memory holds at most "
                    f"{size_text(LIMIT)} of them",
                    where="training.prefix_cache",
                    fix="set training.prefix_cache: disk, or lower data.max_length",
                )
            return
        self._folder = cache_directory()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._folder).free
            if size > free:
                raise self._full(f"the hidden states of all rows take {size_text(size)}, {size_text(free)} are free")
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)
        except OSError as error:
            raise self._full(f"cannot write here: {error.strerror}") from error

    def add(self, numbers: Sequence[int], rows: Sequence[Tensor]) -> None:
        """Adds the states of some examples.

        Args:
            numbers: Of the examples.
            rows: ``(length, hidden)`` of each; all of one dtype and hidden size.

        Raises:
            ResourceError: The file cannot be written.
        """
        part, first = torch.cat(list(rows)).cpu(), 0
        for number, row in zip(numbers, rows, strict=True):
            self._places[number] = (len(self._parts) + len(self._shapes), first, first + len(row))
            first += len(row)
        if self._file is None:
            self._parts.append(part)
            return
        self._shapes.append((part.dtype, part.shape))
        data = part.view(torch.uint8).numpy().data.cast("B")
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise self._full(f"cannot write here: {error.strerror}") from error

    def seal(self) -> None:
        """Maps the file into memory, where there is one."""
        if self._file is None:
            return
        # The mapping keeps a descriptor of its own. Copies on write: torch warns of memory that cannot be written.
        mapped, offset = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY), 0
        for dtype, shape in self._shapes:
            part = torch.frombuffer(mapped, dtype=dtype, count=shape.numel(), offset=offset).view(shape)
            self._parts.append(part)
            offset += part.nbytes
        self._file.close()
        self._shapes = []

    def take(self, numbers: Sequence[int]) -> list[Tensor]:
        """Returns the states of some examples, ``(length, hidden)`` each."""
        places = [self._places[number] for number in numbers]
        return [self._parts[part][first:end] for part, first, end in places]

    def _full(self, message: str) -> ResourceError:
        return ResourceError(
            message,
            where=str(self._folder),
            fix="training.prefix_cache: disk keeps hidden states here while a command runs: make room, or set "
            "XDG_CACHE_HOME to a directory on another disk",
        )
