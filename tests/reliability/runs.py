"""A tiny run that faults are put into, and what must hold of it afterwards."""

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tests.models as models
from tests.end_to_end.support import classification, write_rows
from tests.launch import Launched, launch
from tests.reliability.faults import plan
from ticktune.errors import CheckpointError
from ticktune.files import MANIFEST, new_directory, sha256_file, verify_directory

FULL = re.compile(r"the disk is full \([^)]*\): ([\d,]+) bytes needed, ([\d,]+) bytes free")
STEPS, PER_EPOCH, EVERY = 12, 4, 2
"""Steps of the run and of an epoch; a checkpoint every so many steps."""


@dataclass(frozen=True)
class Work:
    """A folder with a base, rows and a recipe: 3 epochs of 4 steps, in micro-batches of 4 and 4, the last of 4 and 1.

    Args:
        folder: Runs lie in ``runs`` below it.
        recipe: The recipe.
    """

    folder: Path
    recipe: Path

    def run(self, name: str) -> Path:
        """A run's folder."""
        return self.folder / "runs" / name

    def train(self, name: str, *plans: str, words: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
        """``ticktune train`` to its end, under faults."""
        return launch("train", self.recipe, f"output=runs/{name}", *words, cwd=self.folder, env=plan(*plans))

    def training(self, name: str, *plans: str, words: tuple[str, ...] = ()) -> Launched:
        """``ticktune train`` that runs."""
        command = ["train", str(self.recipe), f"output=runs/{name}", *words]
        return Launched(command, self.folder, plan(*plans))

    def export(self, name: str, *words: object, plans: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
        """``ticktune export`` to its end; a merged folder is compared in the same process."""
        return launch("export", f"runs/{name}", *words, cwd=self.folder, env=plan("near", *plans))

    def copy(self, name: str, other: str) -> Path:
        """Another run with the same files."""
        shutil.copytree(self.run(name), self.run(other), symlinks=True)
        return self.run(other)

    def remove(self, name: str) -> None:
        """Removes a run."""
        shutil.rmtree(self.run(name), ignore_errors=True)


def small_work(folder: Path) -> Work:
    """Writes base, rows and recipe into a folder."""
    base = folder / "base"
    base.mkdir(parents=True)
    models.save_tiny_bert(base)
    recipe = classification(
        folder,
        base,
        ticks={"dim": 4, "dropout": 0.1},
        training={"epochs": STEPS // PER_EPOCH},
        checkpoints={"every": EVERY},
        logging={"every": 1},
    )
    for name, count, seed in (("train", 29, 1), ("validation", 12, 2), ("test", 12, 3)):
        write_rows(folder, f"{name}.jsonl", count, seed)
    return Work(folder, recipe)


def run_name(test: str) -> str:
    """The name of a run of a test's own."""
    return "".join(c if c.isalnum() else "-" for c in test)[:40] + hashlib.sha256(test.encode()).hexdigest()[:8]


def result(run: Path) -> dict[str, Any]:
    """What two runs of the same recipe must share, bit for bit: adapter, last state, log, evaluations."""
    newest = sorted(run.glob("checkpoints/step-*"))[-1]
    record = json.loads((run / "run.json").read_text())
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "status": record["status"],
        "adapter": sha256_file(run / "adapter/adapter.safetensors"),
        "last": {name: sha256_file(newest / f"{name}.safetensors") for name in ("adapter", "optimizer", "best")},
        "newest": newest.name,
        "history": record["history"],
        "log": [{k: v for k, v in entry.items() if k != "rows_per_second"} for entry in log],
    }


def broken(run: Path) -> list[str]:
    """Folders under a final name that are not whole."""
    found = []
    for path in [*run.glob("checkpoints/step-*"), run / "adapter", run / "merged"]:
        try:
            if path.exists():
                verify_directory(path)
        except CheckpointError as error:
            found.append(str(error))
    return found


def remade(folder: Path, change: Callable[[Path], object]) -> None:
    """Changes a folder of ours so that it verifies."""
    old = folder.with_name(f"{folder.name}-before")
    folder.rename(old)
    with new_directory(folder) as temporary:
        shutil.copytree(old, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        change(temporary)
    shutil.rmtree(old)


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders below a folder."""
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.startswith((".tmp-", ".old-"))
    )


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder, the lock aside."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


def tried(work: Work, name: str, whole: dict[str, Any], *plans: str, code: int) -> str:
    """Trains into a fault, and again without; says what is wrong then, nothing where all is well.

    Args:
        work: The recipe.
        name: Of a run that does not exist yet; it is removed again where all is well.
        whole: The result without a fault.
        plans: The faults.
        code: How the faulty command ends: minus a signal, or an exit code.
    """
    first = work.train(name, *plans)
    wrong = judged(work, name, first.returncode, first.stderr, code=code) or again(work, name, whole)
    if not wrong:
        work.remove(name)
    return wrong


def judged(work: Work, name: str, found: int, error: str, *, code: int) -> str:
    """What is wrong right after a fault: the exit code, folders that are not whole, an error without its place."""
    if found != code:
        return f"exit code {found}, expected {code}: {error}"
    if half := broken(work.run(name)):
        return f"half-written: {half}"
    if code == 8 and not (FULL.search(error) and f"runs/{name}" in error):
        return f"a full disk is not said: {error}"
    if code == 8 and work.run(name).exists() and (left := leftovers(work.run(name))):
        return f"left behind: {left}"
    return ""


def again(work: Work, name: str, whole: dict[str, Any]) -> str:
    """Runs the same command without a fault; says what is not as it is without an interruption."""
    done = work.train(name)
    if done.returncode != 0:
        return f"the same command again ends with {done.returncode}: {done.stderr}"
    if left := leftovers(work.run(name)):
        return f"not cleaned up: {left}"
    found = result(work.run(name))
    different = [key for key, value in whole.items() if found[key] != value]
    return f"another result: {different}" if different else ""
