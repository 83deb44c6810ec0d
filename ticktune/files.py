"""Files that are whole or absent: atomic writes, verified directories, locks."""

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from ticktune.errors import CheckpointError, OutputError, RecipeError, ResourceError

MANIFEST = "manifest.json"
_TEMPORARY = ".tmp-"
_LOCK = ".lock"
_Record = TypeVar("_Record")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk: no space, no quota, a file that may not grow."""

_UNWRITABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
)


def input_path(text: str, relative_to: Path) -> Path:
    """Turns a path from a recipe into one that can be opened.

    Args:
        text: May begin with ``~`` and hold ``${NAME}`` environment variables.
        relative_to: Directory that a relative path starts from.

    Raises:
        RecipeError: A variable is not set.
    """
    expanded = os.path.expandvars(text)
    unset = re.findall(r"\$\{?\w+\}?", expanded)
    if unset:
        raise RecipeError(
            f"the environment variable {unset[0]} is not set", where=text, fix="set it, or write the path out"
        )
    return relative_to / Path(expanded).expanduser()


def sha256_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Returns the SHA-256 of a value's canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a text file so that it holds the old text or the new one, never part of it.

    Raises:
        ResourceError: The disk is full or the directory cannot be written.
    """
    temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(6)}")
    with writing(path, len(text.encode())):
        try:
            with temporary.open("x", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _fsync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON with :func:`write_text`; NaN and infinity are written as null."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_line(path: Path, value: Any) -> None:
    """Appends one JSON object as a line."""
    line = json.dumps(finite(value), ensure_ascii=False, allow_nan=False) + "\n"
    with writing(path, len(line.encode())), open(path, "a", encoding="utf-8", opener=_no_link) as file:
        file.write(line)


def read_json(path: Path) -> Any:
    """Reads a JSON file of ours.

    Raises:
        CheckpointError: It is missing, cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("the file is missing", where=str(path)) from None
    except OSError as error:
        raise CheckpointError(f"the file cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the file is damaged: {error}", where=str(path)) from error


def as_record(kind: type[_Record], entries: Any) -> _Record:
    """Makes a dataclass of what a JSON file held.

    Args:
        kind: The dataclass; its annotations say what each field may be.
        entries: Field -> value.

    Raises:
        ValueError: It is no object, has a field that the dataclass lacks, lacks one, or one is of another type.
    """
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(entries, dict):
        raise ValueError(f"expected names and values, found {type(entries).__name__}")
    unknown = entries.keys() - {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if unknown:
        raise ValueError(f"the entry {min(unknown)!r} is unknown")
    try:
        return TypeAdapter(kind).validate_json(json.dumps(entries), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"the entry {'.'.join(map(str, first['loc']))!r}: {first['msg']}") from error


@contextmanager
def new_directory(target: Path, *, replace: bool = False, needed: int = 0) -> Iterator[Path]:
    """A directory that appears at ``target`` as a whole, or not at all.

    Yields a temporary directory beside ``target``. When the block ends without an error, every file in it
    is flushed to disk, a manifest with the sizes and SHA-256 of all files is written last, and the
    directory is renamed to ``target``. On an error it is removed; what a killed process left of the same
    ``target`` is removed at the beginning.

    Args:
        target: Where the directory shall stand.
        replace: Exchange it with an existing ``target`` and remove that; only a folder that this function wrote.
        needed: Bytes that will be written, where that is known, for the error of a full disk.

    Raises:
        OutputError: ``target`` exists, and ``replace`` is false or it is not a folder of ours.
        ResourceError: The disk is full or the parent cannot be written.
    """
    if target.exists() or target.is_symlink():
        if not replace:
            raise OutputError("it exists already", where=str(target))
        if not _is_ours(target):
            raise OutputError(
                "it exists, and is no folder that ticktune wrote, so it is not replaced",
                where=str(target),
                fix="choose another place, or remove it yourself",
            )
    with temporary_beside(target, needed) as temporary:
        yield temporary
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        mode = 0o666 & ~_umask()
        for file in files:
            file.chmod(mode)  # safetensors leaves 0600, which another user cannot read
            _fsync_file(file)
        manifest = {
            "files": {
                p.relative_to(temporary).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_file(p)}
                for p in files
            }
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _fsync_file(temporary / MANIFEST)
        for folder in sorted(p for p in temporary.rglob("*") if p.is_dir()):
            _fsync_directory(folder)
        _fsync_directory(temporary)
        _put(temporary, target, replace)
        _fsync_directory(target.parent)


@contextmanager
def temporary_beside(target: Path, needed: int = 0) -> Iterator[Path]:
    """A directory for the block, beside ``target``; what a killed process left of the same ``target`` is removed first.

    Args:
        target: What it is for.
        needed: As in :func:`new_directory`.

    Raises:
        ResourceError: The disk is full or the parent cannot be written.
    """
    temporary = target.parent / f"{_TEMPORARY}{target.name[:40]}-{secrets.token_hex(6)}"
    with writing(target, needed):
        _make_directory(target.parent)
        for left in target.parent.glob(f"{_TEMPORARY}*"):
            if re.fullmatch(rf"{re.escape(_TEMPORARY + target.name[:40])}-[0-9a-f]{{12}}", left.name):
                _remove_leftover(left)
        temporary.mkdir()
        try:
            with _held(temporary):
                yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _put(new: Path, target: Path, replace: bool) -> None:
    """Renames a directory to ``target``; one that is replaced there has the name ``new`` then, or is removed."""
    if not replace or not target.exists():
        try:
            os.rename(new, target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # made by another process since we looked
                raise OutputError("it exists already", where=str(target)) from error
            raise
    elif not _exchange(new, target):
        # Killed between these two renames, the old directory is whole under its other name, which nothing removes.
        old = target.with_name(f".old-{target.name[:40]}-{secrets.token_hex(6)}")
        os.rename(target, old)
        try:
            os.rename(new, target)
        except OSError:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps the names of two directories in one step; false where the system or its file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def remove_directory(directory: Path) -> None:
    """Removes a directory so that a process that is killed meanwhile leaves all of it, or nothing of this name.

    Raises:
        ResourceError: It cannot be removed.
    """
    aside = directory.with_name(f"{_TEMPORARY}{secrets.token_hex(6)}")
    with writing(directory):
        os.rename(directory, aside)
    shutil.rmtree(aside, ignore_errors=True)


def verify_directory(directory: Path) -> None:
    """Compares every file of a directory's manifest with what is there; other files may stand beside them.

    Raises:
        CheckpointError: The manifest is missing, or a file that it names is missing, cut or changed.
    """
    manifest = read_json(directory / MANIFEST)
    recorded = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(recorded, dict) or not all(
        isinstance(facts, dict) and {"bytes", "sha256"} <= facts.keys() for facts in recorded.values()
    ):
        raise CheckpointError("the manifest is damaged", where=str(directory / MANIFEST))
    for name, facts in recorded.items():
        path = directory / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError("the manifest names a file outside of its folder", where=str(path))
        if not os.path.isfile(path):  # unlike Path.is_file, it takes any text
            raise CheckpointError("the file is missing", where=str(path))
        if path.stat().st_size != facts["bytes"] or sha256_file(path) != facts["sha256"]:
            raise CheckpointError("the file is damaged: its SHA-256 is not the recorded one", where=str(path))


def remove_leftovers(directory: Path) -> None:
    """Removes the temporary files and directories that a killed process of ours left behind."""
    for path in directory.glob(f"{_TEMPORARY}*"):
        _remove_leftover(path)


def _remove_leftover(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    with _held(path) as is_free:
        if is_free:  # else a process that lives is writing it, or nobody can say
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _held(directory: Path) -> Iterator[bool]:
    """Marks a directory as one that a living process is writing; false where that cannot be, or another one does."""
    import fcntl

    number = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(number)


@contextmanager
def working(directory: Path) -> Iterator[None]:
    """Makes a directory, proves that it can be written, and holds its lock for the block.

    Where nothing was written by then, the directory and those above it that were made here are removed again.

    Raises:
        ResourceError: It cannot be written or locked.
        OutputError: Another process works there.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    check_writable(directory)
    with lock(directory):
        try:
            yield
        finally:
            with suppress(OSError):  # somebody else uses it, or has removed it
                if os.listdir(directory) == [_LOCK]:
                    (directory / _LOCK).unlink()
                    for path in made:
                        path.rmdir()


@contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Holds ``directory/.lock`` for the block; the kernel frees it when the process ends, however it ends.

    Raises:
        OutputError: Another process holds it.
        ResourceError: It cannot be locked or written.
    """
    number = _locked(directory)
    try:
        text = f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}".encode()
        with writing(directory / _LOCK, len(text)):
            os.ftruncate(number, 0)
            os.write(number, text)
        yield
    finally:
        os.close(number)


def is_locked(directory: Path) -> bool:
    """Whether a process holds the lock of a directory; changes nothing, and makes nothing."""
    import fcntl

    try:
        number = os.open(directory / _LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False  # there is none
    try:
        fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True  # or it cannot be locked, which whoever tries in earnest says
    finally:
        os.close(number)
    return False


def _locked(directory: Path) -> int:
    """Opens and locks the file; anew where its last holder removed it between the two."""
    import fcntl

    path = directory / _LOCK
    while True:
        with writing(path):
            number = _opened(directory, _LOCK, os.O_RDWR | os.O_APPEND)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_there = path.exists() and os.path.samestat(os.fstat(number), path.stat())
        except FileNotFoundError:
            is_there = False
        except OSError as error:
            is_held = error.errno in (errno.EAGAIN, errno.EACCES)
            holder = _holder(number) if is_held else ""
            os.close(number)
            if is_held:
                raise OutputError(
                    f"another process is working in this directory ({holder})",
                    where=str(directory),
                    fix="wait for it, stop it, or choose another output",
                ) from None
            raise ResourceError(
                f"the directory cannot be locked: {error.strerror}",
                where=str(path),
                fix="put the output on a local disk",
            ) from error
        if is_there:
            return number
        os.close(number)


def _holder(number: int) -> str:
    """Who holds a lock; it takes the lock first, and then writes who it is over what the last holder wrote."""
    text = ""
    for _ in range(20):
        text = os.pread(number, 1000, 0).decode(errors="replace").strip()
        if text and _may_live(text):
            break
        time.sleep(0.05)
    return text or "unknown"


def _may_live(holder: str) -> bool:
    found = re.fullmatch(r"pid (\d+) on (.*) since .*", holder)
    if found is None or found[2] != socket.gethostname():
        return True
    try:
        os.kill(int(found[1]), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # of another user
    return True


def save_picture(picture: Any, path: Path) -> None:
    """Writes a picture of Pillow's, and the folders above it.

    Raises:
        ResourceError: It cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


@contextmanager
def writing(path: Path, needed: int = 0) -> Iterator[None]:
    """Turns the errors of a full or unwritable disk into one message.

    Args:
        path: What is written.
        needed: How many bytes, where that is known.

    Raises:
        ResourceError: No space, no permission, or not a directory.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _os_error_number(str(error))
        if number in FULL:
            raise ResourceError(
                full_disk(number, path, needed),
                where=str(path),
                fix="free some space and run the same command again: it goes on from the last checkpoint",
            ) from error
        if number == errno.ELOOP:
            raise ResourceError(
                "it is a link, which is not followed for writing",
                where=str(path),
                fix="remove the link, or choose another output",
            ) from error
        if number in _UNWRITABLE:
            raise ResourceError(f"cannot write here: {os.strerror(number)}", where=str(path)) from error
        raise


def full_disk(number: int, path: Path, needed: int = 0) -> str:
    """What an error of a full disk, an exhausted quota or a file that may not grow says.

    Args:
        number: One of :data:`FULL`.
        path: What is written.
        needed: How many bytes; a block at least.
    """
    needed = max(needed, os.statvfs(_existing_parent(path)).f_frsize)
    return f"the disk is full ({os.strerror(number)}): {needed:,} bytes needed, {free_bytes(path):,} bytes free"


def free_bytes(path: Path) -> int:
    """Returns how many bytes are free where a path is, or would be."""
    return shutil.disk_usage(_existing_parent(path)).free


def check_writable(directory: Path) -> None:
    """Creates ``directory`` and proves that a file can be written in it.

    Raises:
        ResourceError: It cannot.
    """
    probe = directory / f"{_TEMPORARY}probe"  # one name: what a killed process leaves, the next one removes
    with writing(directory):
        probe.unlink(missing_ok=True)
        os.close(_opened(directory, probe.name, os.O_WRONLY))
        probe.unlink(missing_ok=True)


def _opened(directory: Path, name: str, flags: int) -> int:
    """Opens a file in a directory that is made where it is not there, or is removed by another process meanwhile."""
    for _ in range(10):
        with suppress(FileNotFoundError):
            directory.mkdir(parents=True, exist_ok=True)
            return _no_link(str(directory / name), flags | os.O_CREAT)
    raise ResourceError(f"cannot write here: {os.strerror(errno.ENOENT)}", where=str(directory))


def finite(value: Any) -> Any:
    """Returns the value with NaN and infinity, which are not JSON, as None."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _no_link(path: str, flags: int) -> int:
    # What a link in a run's folder points to is somebody else's file.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _is_ours(path: Path) -> bool:
    if path.is_symlink() or not (path / MANIFEST).is_file():
        return False
    try:
        manifest = read_json(path / MANIFEST)
    except CheckpointError:
        return False
    return isinstance(manifest, dict) and isinstance(manifest.get("files"), dict)


def _os_error_number(text: str) -> int | None:
    _, found, rest = text.partition("os error ")
    digits = rest.split(")")[0]
    return int(digits) if found and digits.isdigit() else None


def _existing_parent(path: Path) -> Path:
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def _make_directory(path: Path) -> None:
    """Makes a directory and those above it, each flushed into its parent."""
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir(exist_ok=True)
        _fsync_directory(path.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _fsync_directory(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
