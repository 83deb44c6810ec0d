"""Files that are whole or absent, manifests and locks."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.catalogue import case
from ticktune import files
from ticktune.errors import CheckpointError, OutputError, RecipeError, ResourceError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def folder_with_manifest(parent: Path) -> Path:
    with files.new_directory(parent / "whole") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "a.txt").write_text("one")
        (temporary / "sub" / "b.txt").write_text("two")
    return parent / "whole"


# Paths


def test_a_relative_path_starts_from_the_given_folder() -> None:
    assert files.input_path("x/y", Path("/data")) == Path("/data/x/y")


def test_an_absolute_path_stays() -> None:
    assert files.input_path("/x", Path("/data")) == Path("/x")


def test_home_and_variables_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("PLACE", "there")
    assert files.input_path("~/${PLACE}/$PLACE", Path("/data")) == Path("/home/someone/there/there")


@pytest.mark.parametrize("text", ["${NOT_SET}/x", "$NOT_SET/x"])
def test_a_variable_that_is_not_set_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(RecipeError, match="the environment variable .*NOT_SET.* is not set") as caught:
        files.input_path(text, Path())
    assert caught.value.problems[0].where == text


# Hashes


def test_the_sha256_of_a_file_is_that_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\r\n\0")
    assert files.sha256_file(tmp_path / "a") == hashlib.sha256(b"\r\n\0").hexdigest()


def test_the_sha256_of_json_does_not_depend_on_the_order_of_keys() -> None:
    assert files.sha256_json({"a": 1, "b": [2]}) == files.sha256_json({"b": [2], "a": 1})
    assert files.sha256_json({"a": 1}) != files.sha256_json({"a": 2})


# Writing


def test_a_written_text_is_there_with_its_line_ends_and_nothing_else(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a", "é\n\n")
    assert (tmp_path / "a").read_bytes() == "é\n\n".encode()
    assert names(tmp_path) == ["a"]


def test_a_failed_write_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_text(tmp_path / "a", "old")

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="the disk is full") as caught:
        files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]
    assert caught.value.problems[0].fix.startswith("free some space")


def test_written_json_has_null_for_what_json_cannot_say(tmp_path: Path) -> None:
    value = {"a": float("nan"), "b": [float("inf"), (1.5, -float("inf"))], "c": "é"}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == {"a": None, "b": [None, [1.5, None]], "c": "é"}


def test_an_appended_line_is_one_json_object_a_line(tmp_path: Path) -> None:
    files.append_line(tmp_path / "a.jsonl", {"a": "x\ny"})
    files.append_line(tmp_path / "a.jsonl", {"a": float("nan")})
    assert (tmp_path / "a.jsonl").read_text() == '{"a": "x\\ny"}\n{"a": null}\n'


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000])
def test_damaged_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="the file is damaged: ") as caught:
        files.read_json(tmp_path / "a.json")
    assert caught.value.problems[0].where == str(tmp_path / "a.json")


def test_missing_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the file is missing"):
        files.read_json(tmp_path / "a.json")


def test_a_folder_in_place_of_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the file cannot be read: Is a directory"):
        files.read_json(tmp_path)


# Directories


def test_a_new_directory_is_absent_until_it_is_whole(tmp_path: Path) -> None:
    with files.new_directory(tmp_path / "out") as temporary:
        (temporary / "a").write_text("x")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path / "out") == ["a", "manifest.json"]
    assert names(tmp_path) == ["out"]


def test_a_new_directory_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with files.new_directory(tmp_path / "out") as temporary:
            (temporary / "a").write_text("x")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    assert names(tmp_path) == []


def test_a_manifest_has_size_and_sha256_of_every_file(tmp_path: Path) -> None:
    manifest = json.loads((folder_with_manifest(tmp_path) / "manifest.json").read_text())
    assert manifest["files"] == {
        "a.txt": {"bytes": 3, "sha256": hashlib.sha256(b"one").hexdigest()},
        "sub/b.txt": {"bytes": 3, "sha256": hashlib.sha256(b"two").hexdigest()},
    }


@case("X8")
def test_files_of_a_new_directory_are_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with files.new_directory(tmp_path / "out") as temporary:
            (temporary / "a").write_text("x")
            (temporary / "a").chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "out" / "a").stat().st_mode & 0o777 == 0o640


def test_an_existing_directory_is_not_replaced_unasked(tmp_path: Path) -> None:
    whole = folder_with_manifest(tmp_path)
    with pytest.raises(OutputError, match="it exists already"), files.new_directory(whole):
        pass
    assert (whole / "a.txt").read_text() == "one"


def test_an_existing_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    whole = folder_with_manifest(tmp_path)
    with files.new_directory(whole, replace=True) as temporary:
        (temporary / "c").write_text("x")
        assert (whole / "a.txt").exists()
    assert names(whole) == ["c", "manifest.json"]
    assert names(tmp_path) == ["whole"]


def test_a_replacement_that_fails_keeps_the_old_directory(tmp_path: Path) -> None:
    whole = folder_with_manifest(tmp_path)

    def fail() -> None:
        with files.new_directory(whole, replace=True):
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fail()
    files.verify_directory(whole)


def test_a_directory_that_another_process_makes_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def late() -> None:
        with files.new_directory(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out/mine").write_text("x")

    with pytest.raises(OutputError, match="it exists already"):
        late()
    assert names(tmp_path / "out") == ["mine"]
    assert names(tmp_path) == ["out"]


@case("X3")
@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_directory_that_cannot_be_put_in_place_leaves_the_old_one(
    can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = folder_with_manifest(tmp_path)
    rename, calls = os.rename, 0

    def fail(old: Path, new: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # the old one is aside, the new one is not there yet
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(old, new)

    def exchange(one: Path, other: Path) -> bool:
        if can_exchange:
            raise OSError(errno.ENOSPC, "No space left on device")
        return False

    monkeypatch.setattr(os, "rename", fail)
    monkeypatch.setattr(files, "_exchange", exchange)
    with pytest.raises(ResourceError, match="the disk is full"), files.new_directory(whole, replace=True):
        pass
    files.verify_directory(whole)
    assert (whole / "a.txt").read_text() == "one"
    assert names(tmp_path) == ["whole"]


@case("X3")
def test_what_a_killed_process_left_of_a_directory_is_removed_and_nothing_else(tmp_path: Path) -> None:
    others = [".tmp-out-mine", ".tmp-other-0123456789ab", ".tmp-out-0123456789ab0"]
    for name in (".tmp-out-0123456789ab", ".tmp-out-ba9876543210", *others):
        (tmp_path / name).mkdir()
    with files._held(tmp_path / ".tmp-out-ba9876543210"):  # of a process that lives
        with files.new_directory(tmp_path / "out"):
            pass
        assert names(tmp_path) == sorted([".tmp-out-ba9876543210", *others, "out"])
        files.remove_leftovers(tmp_path)
        assert names(tmp_path) == [".tmp-out-ba9876543210", "out"]


def test_a_whole_directory_verifies(tmp_path: Path) -> None:
    files.verify_directory(folder_with_manifest(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"onf", "the file is damaged"), (b"on", "the file is damaged"), (None, "the file is missing")],
    ids=["flipped", "cut", "missing"],
)
def test_a_changed_file_does_not_verify(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = folder_with_manifest(tmp_path) / "a.txt"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        files.verify_directory(path.parent)
    assert caught.value.problems[0].where == str(path)


def test_a_directory_without_a_manifest_does_not_verify(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the file is missing"):
        files.verify_directory(tmp_path)


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"files": []}', '{"files": {"a": 3}}', '{"files": {"a": {}}}'])
def test_a_manifest_of_another_form_does_not_verify(tmp_path: Path, manifest: str) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match="the manifest is damaged"):
        files.verify_directory(tmp_path)


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".tmp-abc").mkdir()
    (tmp_path / ".tmp-abc" / "x").write_text("x")
    (tmp_path / ".tmp-def").write_text("x")
    (tmp_path / "mine").write_text("x")
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["mine"]


def test_a_leftover_link_is_removed_without_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("x")
    (tmp_path / ".tmp-abc").symlink_to(tmp_path / "mine")
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["mine"]
    assert names(tmp_path / "mine") == ["x"]


# Locks and disks

HOLD = """
import sys
from pathlib import Path
from ticktune.files import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@case("C8", "C9")
def test_a_lock_keeps_another_process_out_and_names_its_holder(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match="another process is working in this directory") as caught:
            with files.lock(tmp_path):
                pass
        assert f"(pid {holder.pid} on " in str(caught.value)
        holder.kill()
    with files.lock(tmp_path):
        assert f"pid {os.getpid()} on " in (tmp_path / ".lock").read_text()


def test_a_lock_is_free_after_its_block(tmp_path: Path) -> None:
    for _ in range(2):
        with files.lock(tmp_path):
            pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "x"), "the disk is full"),
        (OSError(errno.EDQUOT, "x"), "the disk is full"),
        (OSError(errno.EACCES, "x"), "cannot write here: Permission denied"),
        (OSError(errno.EROFS, "x"), "cannot write here: Read-only file system"),
    ],
)
def test_errors_of_the_disk_become_one_message(tmp_path: Path, error: OSError, message: str) -> None:
    with pytest.raises(ResourceError, match=message) as caught, files.writing(tmp_path / "no" / "file"):
        raise error
    assert caught.value.problems[0].where == str(tmp_path / "no" / "file")


def test_a_full_disk_under_safetensors_is_a_full_disk(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(ResourceError, match="the disk is full"), files.writing(tmp_path):
        raise SafetensorError(text)


def test_another_error_passes_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.writing(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "x")


def test_a_probe_that_a_killed_process_left_is_removed_and_no_link_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "mine").write_text("mine")

    def killed(number: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "close", killed)
        with pytest.raises(KeyboardInterrupt):
            files.check_writable(tmp_path / "out")
    [left] = names(tmp_path / "out")
    files.check_writable(tmp_path / "out")
    assert names(tmp_path / "out") == []
    (tmp_path / "out" / left).symlink_to(tmp_path / "mine")
    files.check_writable(tmp_path / "out")
    assert names(tmp_path / "out") == []
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_writable_directory_is_made_and_left_empty(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_in_place_of_a_directory_is_not_writable(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="cannot write here: "):
        files.check_writable(tmp_path / name)
