"""Run folders: what lies where, what state a run is in, and which folder a command means."""

import json
import os
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ticktune.adapter import FACTS as ADAPTER_FACTS
from ticktune.console import Console
from ticktune.errors import CheckpointError, OutputError, RecipeError, UsageError
from ticktune.export.save import FACTS as MERGED_FACTS
from ticktune.files import as_record, input_path, read_json, write_json, write_text
from ticktune.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from ticktune.recipe.schema import Recipe, Source

# Sections that do not change the result: they may differ when a run goes on.
_FREE = ("output", "logging", "checkpoints", "version")


@dataclass(frozen=True)
class _Complete:
    """What the record of a complete run must say."""

    finished_at: str
    steps: int
    chosen_step: int
    metric: str
    metrics: dict[str, float | None]
    base_metrics: dict[str, float | None]
    training_seconds: float
    trained_parameters: int
    base_parameters: int


@dataclass(frozen=True)
class RunFolder:
    """One run's output.

    Args:
        path: The folder.
    """

    path: Path

    @property
    def record_path(self) -> Path:
        """run.json: status, versions, hashes, timings."""
        return self.path / "run.json"

    @property
    def recipe_path(self) -> Path:
        """recipe.yaml: every default spelled out."""
        return self.path / "recipe.yaml"

    @property
    def metrics_path(self) -> Path:
        """metrics.jsonl: one line for each logged step and each evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def report_path(self) -> Path:
        """report.html: curves, tables, the recipe, the environment."""
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        """The folder of training states."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The result."""
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        """Where ``export --merge`` writes when nothing else is said."""
        return self.path / "merged"

    def record(self) -> dict[str, Any]:
        """run.json, or an empty dict where there is none.

        Raises:
            CheckpointError: It is damaged.
        """
        if not self.record_path.exists():
            return {}
        record = read_json(self.record_path)
        try:
            if not isinstance(record, dict) or not isinstance(record.get("status"), str):
                raise ValueError("it has no status")
            if record["status"] == "complete":
                names = {field.name for field in fields(_Complete)}
                as_record(_Complete, {name: value for name, value in record.items() if name in names})
        except ValueError as error:
            raise CheckpointError(
                f"the record of the run is damaged: {error}",
                where=str(self.record_path),
                fix="ticktune train --restart",
            ) from error
        return record

    def update(self, **entries: Any) -> None:
        """Changes entries of run.json."""
        write_json(self.record_path, self.record() | entries)

    def write_recipe(self, loaded: LoadedRecipe) -> None:
        """Writes the resolved recipe; its relative paths start from this folder."""
        write_text(self.recipe_path, dump_recipe(relocate(loaded.recipe, loaded.path.parent, self.path)))

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that a killed process left cut is passed over."""
        entries = []
        if self.metrics_path.exists():
            for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                if isinstance(entry, dict):
                    entries.append(entry)
        return entries

    def trim_metrics(self, step: int, evaluated: Collection[int]) -> None:
        """Drops the lines of what will be done again: later steps, and evaluations that no state knows of.

        Args:
            step: Steps done.
            evaluated: Steps whose evaluation is done.
        """
        kept = [
            entry
            for entry in self.metrics()
            if entry.get("step", 0) <= step and ("split" not in entry or entry.get("step") in evaluated)
        ]
        if self.metrics_path.exists():
            write_text(self.metrics_path, "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in kept))

    def check_foreign(self) -> None:
        """Refuses a folder that holds something else than a run.

        Raises:
            OutputError: Nothing in it is touched.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputError("this is a file, not a folder", where=str(self.path), fix="choose another output")
        ours = (".lock", ".tmp-")
        if self.path.exists() and not self.record_path.exists():
            others = [p.name for p in self.path.iterdir() if not p.name.startswith(ours)]
            if others:
                raise OutputError(
                    f"the folder holds other things ({', '.join(sorted(others)[:3])}) and no run",
                    where=str(self.path),
                    fix="choose another output",
                )

    def check_links(self) -> None:
        """Refuses links where this run would write or delete: what they point to is not its own.

        Raises:
            OutputError: Nothing is touched.
        """
        for path in (self.checkpoints, self.adapter, self.metrics_path):
            if path.is_symlink():
                raise OutputError(
                    "it is a link, which is not followed for writing",
                    where=str(path),
                    fix="remove the link, or make the whole output folder one",
                )


@dataclass(frozen=True)
class Target:
    """What a command works on.

    Args:
        kind: An adapter, or a merged folder.
        path: The adapter's or merged folder.
        run: The run that it belongs to, where there is one.
    """

    kind: Literal["adapter", "merged"]
    path: Path
    run: RunFolder | None

    @property
    def name(self) -> str:
        """How messages call it."""
        return str(self.path if self.run is None or self.kind == "merged" else self.run.path)

    def recipe(self) -> LoadedRecipe | None:
        """The run's recipe, where there is a run."""
        return load_recipe(self.run.recipe_path) if self.run and self.run.recipe_path.exists() else None


def is_target(argument: str) -> bool:
    """Whether a command-line word names a run, recipe or folder, rather than text."""
    path = Path(argument)
    # os.path's functions, unlike those of Path, take any text, be it ever so long.
    return (bool(argument) and os.path.isdir(argument)) or (
        path.suffix in (".yaml", ".yml") and os.path.isfile(argument)
    )


def find_target(argument: str | None) -> Target:
    """Finds what a command means.

    Args:
        argument: A run, a recipe, an adapter folder or a merged folder; None: the complete run under ``./runs``
            that finished last.

    Raises:
        UsageError: There is no such thing, or the run is not complete.
    """
    if argument is None:
        return _of_run(newest_run(Path("runs")))
    path = Path(argument)
    if path.suffix in (".yaml", ".yml") and os.path.isfile(argument):
        loaded = load_recipe(path)
        return _of_run(RunFolder(output_path(loaded)))
    if not os.path.isdir(argument):
        raise UsageError("there is no such folder or recipe", where=argument)
    if (path / "run.json").is_file():
        return _of_run(RunFolder(path))
    parent = RunFolder(path.absolute().parent)
    run = parent if parent.record_path.is_file() else None
    if (path / ADAPTER_FACTS).is_file():
        return Target("adapter", path, run)
    if (path / MERGED_FACTS).is_file():
        return Target("merged", path, run)
    raise UsageError(
        f"the folder is no run, adapter or merged folder (no run.json, {ADAPTER_FACTS} or {MERGED_FACTS})",
        where=argument,
    )


def newest_run(root: Path) -> RunFolder:
    """Returns the complete run with the latest ``finished_at``.

    Raises:
        UsageError: There is none.
    """
    complete: list[tuple[str, RunFolder]] = []
    for path in sorted(root.rglob("run.json")) if root.is_dir() else []:
        try:
            record = RunFolder(path.parent).record()
        except CheckpointError as error:
            Console().warn(f"passed over: {error}")
            continue
        if record.get("status") == "complete":
            complete.append((record["finished_at"], RunFolder(path.parent)))
    if not complete:
        raise UsageError(
            f"there is no complete run under {root.absolute()}",
            fix="name a run, or train one: ticktune train RECIPE",
        )
    return max(complete, key=lambda item: item[0])[1]


def output_path(loaded: LoadedRecipe) -> Path:
    """The run folder that a recipe names, relative to the working directory.

    Raises:
        RecipeError: The name of the recipe's file is none of a folder.
    """
    if "{name}" in loaded.recipe.output and loaded.path.stem in (".", ".."):
        raise RecipeError(
            "the file's name without its ending names no folder of its own, which output asks for",
            where=str(loaded.path),
            fix="rename the file, or set output",
        )
    return Path(loaded.recipe.output.replace("{name}", loaded.path.stem)).expanduser()


def relocate(recipe: Recipe, old: Path, new: Path) -> Recipe:
    """Rewrites the relative paths of a recipe in ``old`` for a recipe in ``new``."""
    data = recipe.data
    changes: dict[str, Any] = {}
    for name in ("train", "validation", "test"):
        source: Source | None = getattr(data, name)
        if source is not None and source.path is not None:
            changes[name] = source.model_copy(update={"path": _moved(source.path, old, new)})
    base = recipe.base
    if "package:" not in base.model and input_path(base.model, old).is_dir():
        base = base.model_copy(update={"model": _moved(base.model, old, new)})
    return recipe.model_copy(update={"data": data.model_copy(update=changes), "base": base})


def result_relevant(recipe: Recipe) -> dict[str, Any]:
    """The keys of a resolved recipe that decide the result, flat: dotted key -> value."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            flat[prefix] = value

    walk("", {key: value for key, value in recipe.model_dump(mode="json").items() if key not in _FREE})
    return flat


def _moved(path: str, old: Path, new: Path) -> str:
    if "$" in path or path.startswith("~"):
        return path
    target = (old / path).absolute()
    home = Path.home()
    if target.is_relative_to(home) and (Path(path).is_absolute() or not new.absolute().is_relative_to(home)):
        return "~/" + target.relative_to(home).as_posix()  # no user's name in a file that may be shared
    if Path(path).is_absolute():
        return path
    return Path(os.path.relpath(target, new.absolute())).as_posix()


def _of_run(run: RunFolder) -> Target:
    status = run.record().get("status")
    if status is None:
        raise UsageError("there is no run here yet", where=str(run.path), fix="ticktune train RECIPE")
    if not (run.adapter / ADAPTER_FACTS).is_file():
        raise UsageError(
            f"the run has no adapter yet (status: {status})",
            where=str(run.path),
            fix="run ticktune train again",
        )
    return Target("adapter", run.adapter, run)
