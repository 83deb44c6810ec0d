"""What a stopped run goes on from, what it refuses, and what a second process may do to it: nothing."""

import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.launch import launch
from tests.reliability.catalogue import case
from tests.reliability.faults import can_trace
from tests.reliability.golden import FOLDER, SAVED
from tests.reliability.golden import STEPS as LAST
from tests.reliability.recipes import refused
from tests.reliability.runs import Work, again, broken, hashes, leftovers, remade, result, run_name, small_work, tried
from ticktune.files import sha256_file

NEWEST = "checkpoints/step-00000006"
PAIRS = 5


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A recipe, its run ``whole``, and ``stopped``: killed after step 7, with the checkpoints of steps 4 and 6."""
    made = small_work(tmp_path_factory.mktemp("going-on"))
    assert made.train("whole").returncode == 0
    assert made.train("stopped", "KILL@ticktune.session.Session._show#7").returncode == -signal.SIGKILL
    assert (made.run("stopped") / NEWEST).is_dir()
    return made


@pytest.fixture(scope="module")
def whole(work: Work) -> dict[str, Any]:
    return result(work.run("whole"))


@pytest.fixture
def name(work: Work, request: pytest.FixtureRequest) -> str:
    """A copy of the stopped run."""
    work.copy("stopped", name := run_name(request.node.name))
    return name


# Signals


@case("C4")
@pytest.mark.parametrize(
    "point",
    [
        "ticktune.prepare.encode_rows#1",
        "ticktune.prepare.load_model#1",
        "ticktune.session.score#1",
        "disk#30",  # within the first save
    ],
)
def test_a_signal_stops_anywhere_and_nothing_is_half_written(
    point: str, work: Work, whole: dict[str, Any], name: str
) -> None:
    work.remove(name)
    done = work.train(name, f"TERM@{point}")
    refused(done, 143, "error[interrupted]: stopped ")
    assert not broken(work.run(name))
    assert not leftovers(work.run(name))
    assert not again(work, name, whole)


@case("C4")
def test_a_second_signal_ends_at_once_and_costs_no_checkpoint(work: Work, whole: dict[str, Any], name: str) -> None:
    before = hashes(work.run(name) / NEWEST)
    # Within the write of the next checkpoint.
    done = work.train(name, "TERM+TERM@safetensors.torch.save_file#2")
    assert done.returncode == -signal.SIGTERM
    assert leftovers(work.run(name))
    assert hashes(work.run(name) / NEWEST) == before
    assert not again(work, name, whole)


# Checkpoints that are damaged


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda p: _flip(p / "optimizer.safetensors"), "optimizer.safetensors: the file is damaged"),
    "cut": (lambda p: os.truncate(p / "adapter.safetensors", 100), "adapter.safetensors: the file is damaged"),
    "empty": (lambda p: os.truncate(p / "state.json", 0), "state.json: the file is damaged"),
    "deleted": (lambda p: (p / "best.safetensors").unlink(), "best.safetensors: the file is missing"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json: the file is missing"),
    "empty manifest": (lambda p: os.truncate(p / "manifest.json", 0), "manifest.json: the file is damaged"),
    "another manifest": (lambda p: (p / "manifest.json").write_text("[]"), "the manifest is damaged"),
}


@case("C6")
@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_put_aside(
    damage: Callable[[Path], object], reason: str, work: Work, whole: dict[str, Any], name: str
) -> None:
    damage(work.run(name) / NEWEST)
    files = hashes(work.run(name) / NEWEST)
    done = work.train(name)
    assert done.returncode == 0
    assert re.search(rf"warning: .*{re.escape(reason)}.*put aside as damaged-step-00000006", flat(done.stderr))
    assert "going on after step 4 of 12" in done.stderr
    assert hashes(work.run(name) / "checkpoints/damaged-step-00000006") == files
    assert result(work.run(name)) == whole


def flat(text: str) -> str:
    return " ".join(text.split())


@case("C11")
def test_nothing_starts_over_by_itself(work: Work, whole: dict[str, Any], name: str) -> None:
    for path in work.run(name).glob("checkpoints/*"):
        _flip(path / "adapter.safetensors")
    for _ in range(2):  # also when they have all been put aside
        refused(work.train(name), 6, "all checkpoints are damaged", "--restart")
    assert work.train(name, words=("--restart",)).returncode == 0
    assert result(work.run(name)) == whole


@case("C21")
def test_the_newest_checkpoint_is_that_of_the_highest_step_whatever_the_clock_says(
    work: Work, whole: dict[str, Any], name: str
) -> None:
    for file in [work.run(name) / NEWEST, *(work.run(name) / NEWEST).iterdir()]:
        os.utime(file, (1, 1))
    done = work.train(name)
    assert "going on after step 6 of 12" in done.stderr
    assert result(work.run(name)) == whole


# What has changed


@case("C7")
@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("optimizer.lr", "0.03", "0.001"),
        ("training.seed", "42", "7"),
        ("data.max_length", "16", "8"),
        ("training.batch_size", "8", "16"),
        ("training.micro_batch_size", "4", "8"),
        ("training.precision", "fp32", "auto"),
        ("ticks.dim", "4", "8"),
    ],
)
def test_a_changed_recipe_is_refused(key: str, old: str, new: str, work: Work) -> None:
    before = hashes(work.run("stopped"))
    done = work.train("stopped", words=(f"{key}={new}",))
    refused(done, 7, f"{key}: {old} -> {new}", "choose another output, undo the change, or start over with --restart")
    assert hashes(work.run("stopped")) == before


@case("C7")
def test_what_changes_no_result_may_change(work: Work, whole: dict[str, Any], name: str) -> None:
    done = work.train(name, words=("logging.every=3", "checkpoints.every=5", "checkpoints.keep=1"))
    assert done.returncode == 0, done.stderr
    assert {k: v for k, v in result(work.run(name)).items() if k != "log"} == {
        k: v for k, v in whole.items() if k != "log"
    }


def _another_word(path: Path) -> None:
    path.write_text(path.read_text().replace("w1", "w2", 1))


@case("C10")
@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("train.jsonl", _another_word, "data.train changed"),
        ("validation.jsonl", _another_word, "data.validation changed"),
        ("base/model.safetensors", _flip, "base changed"),
        ("base/tokenizer.json", _another_word, "tokenizer"),
    ],
)
def test_changed_inputs_are_refused(file: str, change: Callable[[Path], None], said: str, work: Work) -> None:
    before, path = hashes(work.run("stopped")), work.folder / file
    content = path.read_bytes()
    try:
        change(path)
        done = work.train("stopped")
    finally:
        path.write_bytes(content)
    refused(done, 7, said, "changed since this run began", "--restart")
    assert hashes(work.run("stopped")) == before


@case("C17")
def test_another_thread_count_or_version_is_said_and_recorded(work: Work, name: str) -> None:
    path = work.run(name) / "run.json"
    record = json.loads(path.read_text())
    here = record["versions"]["torch"]
    record["versions"]["torch"], record["compute"]["threads"] = "0.0.1", 2
    path.write_text(json.dumps(record))
    done = work.train(name)
    assert done.returncode == 0, done.stderr
    said = "the run goes on with threads 2 -> 1, torch 0.0.1 -> "
    assert f"{said}{here}: the result need not be bitwise the same" in flat(done.stderr)
    found = json.loads(path.read_text())
    assert [(e["compute"]["threads"], e["versions"]["torch"]) for e in found["continued"]] == [(1, here)]
    assert found["versions"]["torch"] == "0.0.1"
    assert "goes on with" not in work.train(name).stderr


# Several processes, and what is not ours


@case("C8", "C9")
def test_one_of_two_processes_works_and_the_other_is_refused(work: Work, name: str) -> None:
    work.remove(name)
    words = ("training.epochs=20",)
    with work.training(name, words=words) as one, work.training(name, words=words) as other:
        deadline = time.monotonic() + 60
        while one.poll() is None and other.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        loser, winner = (one, other) if one.poll() is not None else (other, one)
        done = loser.completed()
        assert winner.poll() is None  # it was refused while the other worked
        late = work.train(name, words=words)
        refused(late, 7, "another process is working in this directory")
        assert winner.poll() is None
        refused(done, 7, f"another process is working in this directory (pid {winner.pid} on ", " since ")
        assert winner.completed().returncode == 0
    # The lock's file still names the process that is gone.
    assert f"pid {winner.pid} " in (work.run(name) / ".lock").read_text()
    assert "already complete" in work.train(name, words=words).stderr


@case("C8")
def test_of_two_processes_at_once_one_goes_on_as_if_it_were_alone(work: Work, whole: dict[str, Any], name: str) -> None:
    seconds = []
    for _ in range(PAIRS):
        work.remove(name)
        work.copy("stopped", name)  # its lock names a process that is dead
        with work.training(name) as one, work.training(name) as other:
            done, late = one.completed(), other.completed()
            if done.returncode != 0:
                one, other, done, late = other, one, late, done
            assert done.returncode == 0, done.stderr + late.stderr
            named = f"another process is working in this directory (pid {one.pid} on {socket.gethostname()} since 2"
            refused(late, 7, named)
            seconds.append(other.seconds)
        assert result(work.run(name)) == whole
    assert sorted(seconds)[PAIRS // 2] < 2


@case("C9")
def test_a_file_system_that_cannot_lock_is_refused(work: Work, name: str) -> None:
    before = hashes(work.run(name))
    done = work.train(name, "ENOLCK@fcntl.flock#1")
    refused(done, 8, "the directory cannot be locked", "put the output on a local disk")
    assert hashes(work.run(name)) == before


@case("C13")
def test_files_of_others_stay(work: Work, whole: dict[str, Any], name: str) -> None:
    run = work.run(name)
    (run / "notes.txt").write_text("mine")
    (run / "checkpoints/mine").mkdir()
    assert work.train(name).returncode == 0
    assert (run / "notes.txt").read_text() == "mine"
    assert (run / "checkpoints/mine").is_dir()
    assert work.train(name, words=("--restart",)).returncode == 0
    assert (run / "notes.txt").read_text() == "mine"
    (run / "run.json").unlink()
    before = hashes(run)
    for words in ((), ("--restart",)):
        refused(work.train(name, words=words), 7, "the folder holds other things", "no run")
    assert hashes(run) == before


@case("C13")
def test_a_refused_run_leaves_no_folder_behind(work: Work) -> None:
    words = ("data.train=nothing.jsonl",)
    refused(work.train("new/deeper", words=words), 4, "nothing.jsonl")
    assert not work.run("new").exists()
    work.run("new").mkdir()
    refused(work.train("new/deeper", words=words), 4, "nothing.jsonl")
    refused(work.train("new", words=words), 4, "nothing.jsonl")
    assert list(work.run("new").iterdir()) == []  # it was there before


@case("C12")
def test_a_finished_run_is_left_as_it_is(work: Work) -> None:
    run = work.run("whole")

    def state() -> dict[str, Any]:
        paths = [run, *run.rglob("*")]
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_ino, p.is_file() and sha256_file(p)) for p in paths}

    assert (run / ".lock").is_file()

    before = state()
    done = work.train("whole")
    assert done.returncode == 0
    assert "already complete" in done.stderr
    assert state() == before


@case("C16")
@pytest.mark.parametrize(
    ("output", "code", "said"),
    [
        ("file/run", 8, "cannot write here: Not a directory"),
        ("file", 7, "this is a file, not a folder"),
        ("x" * 300, 2, "a name of more than 255 bytes"),
        ("runs/read-only", 8, "cannot write here: Read-only file system"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_base_is_looked_for(
    output: str, code: int, said: str, work: Work
) -> None:
    (work.folder / "file").write_text("")
    plans = ("EROFS@disk#1",) if output.startswith("runs") else ()
    done = work.train("unused", *plans, words=(f"output={output}", "base.model=./nothing"))
    refused(done, code, said)


# Starting over


@case("C1", "C11")
@pytest.mark.parametrize("number", [4, 6, 9, 13, 16, 18])
def test_killed_while_starting_over_no_other_recipe_goes_on_from_the_old_checkpoints(
    number: int, work: Work, whole: dict[str, Any], name: str
) -> None:
    other = "training.seed=7"
    work.train(name, f"KILL@disk#{number}", words=(other, "--restart"))
    done = work.train(name, words=(other,))
    if done.returncode == 7:  # the old run is still there
        assert "training.seed: 42 -> 7" in done.stderr
        assert not again(work, name, whole)
    else:
        assert done.returncode == 0, done.stderr
        assert "going on" not in done.stderr


# The order of writing


@case("C20")
def test_a_save_flushes_files_then_manifest_then_folder_and_renames(work: Work, name: str, tmp_path: Path) -> None:
    work.remove(name)
    trace = tmp_path / "trace"
    assert work.train(name, f"trace={trace}").returncode == 0
    calls = [line.split("\t")[1:-1] for line in trace.read_text().splitlines()]
    folder = work.run(name) / "checkpoints"
    [end] = [n for n, call in enumerate(calls) if call[0] == "rename" and call[2:] == [str(folder / "step-00000006")]]
    temporary = Path(calls[end][1])
    written = [call for call in calls[:end] if call[1].startswith(str(temporary)) and ".tmp-" not in Path(call[1]).name]
    flushed = [Path(call[1]).name for call in written if call[0] == "fsync"]
    tensors = ["adapter.safetensors", "best.safetensors", "optimizer.safetensors"]
    assert flushed == [*tensors, "state.json", "manifest.json"]
    last = {Path(call[1]).name: n for n, call in enumerate(written) if call[0] in ("save", "saved", "open")}
    assert max(last[t] for t in tensors) < written.index(["fsync", str(temporary / tensors[0])]) < last["manifest.json"]
    assert calls[end - 1] == ["fsync", str(temporary)]
    assert calls[end + 1] == ["fsync", str(folder)]
    # Only then the oldest is retired.
    assert calls[end + 2][:2] == ["rename", str(folder / "step-00000002")]


@case("C2")
@pytest.mark.skipif(not can_trace(), reason="strace is not installed, or may not trace here")
@pytest.mark.parametrize(
    "call", ["rename:signal=KILL:when=5", "fsync:signal=KILL:when=20", "write:signal=KILL:when=30"]
)
def test_killed_within_a_system_call(call: str, work: Work, whole: dict[str, Any], name: str) -> None:
    work.remove(name)
    assert not tried(work, name, whole, f"strace={call}", code=-9)


# Other versions


@case("C18")
@pytest.mark.parametrize("folder", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_a_run_of_every_older_format_goes_on(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "old")
    log = (tmp_path / "old/run/metrics.jsonl").read_text().splitlines()
    state = json.loads((tmp_path / f"old/run/checkpoints/step-{SAVED:08d}/state.json").read_text())
    done = launch("train", "recipe.yaml", cwd=tmp_path / "old")
    assert done.returncode == 0, done.stderr
    assert f"going on after step {SAVED} of {LAST}" in done.stderr
    record = json.loads((tmp_path / "old/run/run.json").read_text())
    assert (record["status"], record["steps"]) == ("complete", LAST)
    assert record["history"][: len(state["progress"]["history"])] == state["progress"]["history"]
    kept = [line for line in log if json.loads(line)["step"] <= SAVED]
    assert (tmp_path / "old/run/metrics.jsonl").read_text().splitlines()[: len(kept)] == kept


@case("C18")
def test_a_recipe_that_had_fewer_keys_goes_on(work: Work, whole: dict[str, Any], name: str) -> None:
    path = work.run(name) / "run.json"
    record = json.loads(path.read_text())
    del record["recipe"]["data.separator"], record["recipe"]["loss.label_smoothing"]
    path.write_text(json.dumps(record))
    refused(work.train(name, words=("loss.label_smoothing=0.1",)), 7, "loss.label_smoothing: None -> 0.1")
    assert not again(work, name, whole)


@case("C18")
def test_a_checkpoint_of_a_newer_version_is_refused(work: Work, name: str) -> None:
    for path in (work.run(name) / "checkpoints").iterdir():
        state = json.loads((path / "state.json").read_text())
        remade(path, lambda at, state=state: (at / "state.json").write_text(json.dumps(state | {"format": 99})))
    before = hashes(work.run(name))
    done = work.train(name)
    refused(done, 6, "the checkpoint has the format 99, this version reads 1", "use the version of ticktune that wrote")
    after = hashes(work.run(name))
    assert {n: h for n, h in after.items() if "checkpoints" in n} == {
        n: h for n, h in before.items() if "checkpoints" in n
    }
