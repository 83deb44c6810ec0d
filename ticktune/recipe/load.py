"""YAML with line and column -> a validated recipe; every mistake in one pass, before anything slow."""

import difflib
import math
import os
import re
import shlex
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ticktune.errors import Problem, RecipeError
from ticktune.recipe.check import check
from ticktune.recipe.schema import _YAML_11_WORDS, SCHEMA_VERSION, PlainWord, Recipe
from ticktune.registry import TASKS

_MAX_BYTES = 1_000_000
_MAX_DEPTH = 32
_MAX_VALUES = 10_000  # keys and values; to find the nearest of the known keys for each takes its time
_MAX_PROBLEMS = 200
_MAX_SHOWN = 80  # characters of a value in a message
_SPLITS = ("train", "validation", "test")

# YAML 1.2's core schema: 1e-4 is a number, and 010, 12:30 and 2024-01-01 are not.
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")

# What other tools call a key.
_ELSEWHERE_CALLED = {
    "learning_rate": "optimizer.lr",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.steps",
    "per_device_train_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.micro_batch_size",
    "model_name_or_path": "base.model",
    "base_model": "base.model",
    "lr_scheduler_type": "schedule.name",
    "warmup_ratio": "schedule.warmup",
    "max_seq_length": "data.max_length",
    "max_grad_norm": "optimizer.clip",
    "output_dir": "output",
    "bf16": "training.precision",
    "fp16": "training.precision",
}

Path_ = tuple[str | int, ...]


@dataclass
class Mark:
    """Where a value stands, and how it was written."""

    line: int
    column: int
    text: str = ""
    quoted: bool = False


@dataclass
class Tree:
    """Plain values, and the place of each by its path of keys."""

    source: str
    values: Any = None
    marks: dict[Path_, Mark] = field(default_factory=dict)
    command_line: set[Path_] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    def where(self, path: Path_) -> str:
        """``file:line:column dotted.key`` of a path, or of the nearest parent that has a place."""
        name = dotted(path)
        if self.is_from_command_line(path):
            return f"command line: {name}"
        for length in range(len(path), -1, -1):
            if path[:length] in self.marks:
                mark = self.marks[path[:length]]
                return f"{self.source}:{mark.line}:{mark.column}" + (f" {name}" if name else "")
        return f"{self.source} {name}" if name else self.source

    def is_from_command_line(self, path: Path_) -> bool:
        """Whether the value of a path was given, or its group begun, on the command line."""
        return any(
            path[: len(given)] == given or (path not in self.marks and given[: len(path)] == path)
            for given in self.command_line
        )


@dataclass(frozen=True)
class LoadedRecipe:
    """A validated recipe and where it came from.

    Args:
        recipe: All values, defaults filled in.
        path: The recipe file.
        tree: Places of the values, for later messages.
        overrides: Those of the command line.
    """

    recipe: Recipe
    path: Path
    tree: Tree
    overrides: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """The command that trains it, for a shell."""
        return shlex.join(["ticktune", "train", str(self.path), *self.overrides])

    def where(self, key: str) -> str:
        """``file:line:column key`` of a dotted key."""
        return self.tree.where(tuple(key.split(".")))

    def says(self, key: str) -> bool:
        """Whether a dotted key stands in the recipe or on the command line, rather than having its default."""
        values: Any = self.tree.values
        for part in key.split("."):
            if not isinstance(values, dict) or part not in values:
                return False
            values = values[part]
        return True


def dotted(path: Iterable[str | int]) -> str:
    """``data.train.path`` or ``ticks.layers[2]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> LoadedRecipe:
    """Reads a recipe and the ``key=value`` overrides of the command line.

    Args:
        path: The YAML file.
        overrides: For example ``ticks.dim=32``; the same rules hold as in the file.

    Raises:
        RecipeError: With every problem found, sorted by line.
    """
    overrides = tuple(overrides)
    tree = parse_yaml(_read(path), str(path))
    problems = tree.problems + _apply_overrides(tree, overrides)
    if not isinstance(tree.values, dict):
        raise RecipeError(
            f"expected keys and values at the top level, found {_kind(tree.values)}", where=tree.where(())
        )
    values = _with_task_defaults(tree.values)
    recipe = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False)
        problems += [_problem(tree, detail) for detail in found[:_MAX_PROBLEMS]]
        if len(found) > _MAX_PROBLEMS:
            problems.append(Problem(f"and {len(found) - _MAX_PROBLEMS} more mistakes of this kind", str(path)))
    problems += check(values, recipe, tree.where)
    if problems or recipe is None:
        raise RecipeError(sorted(dict.fromkeys(problems), key=_line_of))
    return LoadedRecipe(recipe, path, tree, overrides)


def dump_recipe(recipe: Recipe) -> str:
    """Returns the recipe as YAML, every default spelled out."""
    return yaml.dump(
        recipe.model_dump(mode="json"),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,
        width=100,
    )


class _Dumper(yaml.SafeDumper):
    """Quotes the text that :func:`plain_scalar` would read as something else, such as 1e-4 and y."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    is_safe = type(plain_scalar(text)) is str
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_safe else '"')


_Dumper.add_representer(str, _represent_text)


def parse_yaml(text: str, source: str) -> Tree:
    """Parses YAML with the scalars of YAML 1.2, keeping line and column of every value.

    Args:
        text: The document.
        source: Its name in messages.

    Returns:
        The tree; duplicate keys and keys that are not plain words stand in its ``problems``.

    Raises:
        RecipeError: It is not YAML, or has anchors, aliases or tags.
    """
    tree = Tree(source)
    try:
        _check_events(text, source)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise _yaml_problem(error, source) from error
    if node is None:
        raise RecipeError("the file is empty", where=source)
    tree.values = _build(node, (), tree)
    return tree


def _read(path: Path) -> str:
    where = str(path)
    try:
        if path.stat().st_size > _MAX_BYTES and not path.is_dir():
            raise RecipeError("the file is larger than 1 MB: not a recipe", where=where)
        data = path.read_bytes()
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, _yaml_files(path.parent), 1)
        fix = f"did you mean {path.parent / near[0]}?" if near else "give the path of a recipe file"
        raise RecipeError("there is no such file", where=where, fix=fix) from None
    except IsADirectoryError:
        raise RecipeError("this is a directory, not a recipe file", where=where) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RecipeError(f"cannot be read: {reason}", where=where) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"byte {error.start} is not UTF-8", where=where, fix="save the file as UTF-8") from error
    if "\0" in text:
        raise RecipeError(
            f"byte {text.index(chr(0))} is NUL: not a text file", where=where, fix="save the file as UTF-8"
        )
    return text


def _yaml_files(directory: Path) -> list[str]:
    if not directory.is_dir():
        return []
    return [name for name in os.listdir(directory) if name.endswith((".yaml", ".yml"))]


def _check_events(text: str, source: str) -> None:
    depth = values = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        mark = event.start_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise RecipeError("anchors and aliases are not used in recipes", where=place, fix="write it out")
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag not in (None, "!"):
            raise RecipeError(f"the tag {event.tag} is not used in recipes", where=place, fix="remove it")
        if isinstance(event, yaml.ScalarEvent) and any("\ud800" <= c <= "\udfff" for c in event.value):
            raise RecipeError(
                "half of a surrogate pair, which is not text", where=place, fix="write the whole character"
            )
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        values += isinstance(event, yaml.ScalarEvent)
        if depth > _MAX_DEPTH:
            raise RecipeError(f"more than {_MAX_DEPTH} levels of nesting", where=place)
        if values > _MAX_VALUES:
            raise RecipeError(f"more than {_MAX_VALUES:,} keys and values: not a recipe", where=place)


def _yaml_problem(error: yaml.YAMLError, source: str) -> RecipeError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    fix = "indent with spaces, not tabs" if "\\t" in str(reason) else ""
    return RecipeError(f"this is not YAML: {reason}", where=place, fix=fix)


def _build(node: yaml.Node, path: Path_, tree: Tree) -> Any:
    line, column = node.start_mark.line + 1, node.start_mark.column + 1
    if isinstance(node, yaml.ScalarNode):
        tree.marks[path] = Mark(line, column, node.value, quoted=node.style is not None)
        return node.value if node.style else plain_scalar(node.value)
    tree.marks.setdefault(path, Mark(line, column))
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*path, i), tree) for i, item in enumerate(node.value)]
    values: dict[Any, Any] = {}
    first_lines: dict[Any, int] = {}
    for key_node, value_node in node.value:
        key_line, key_column = key_node.start_mark.line + 1, key_node.start_mark.column + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.value == "<<":
            tree.problems.append(
                Problem(
                    "a key must be a plain word",
                    f"{tree.source}:{key_line}:{key_column} {dotted(path)}".rstrip(),
                )
            )
            continue
        key = key_node.value
        if key in first_lines:
            tree.problems.append(
                Problem(
                    f"the key stands here and in line {first_lines[key]}",
                    f"{tree.source}:{key_line}:{key_column} {dotted((*path, key))}",
                    "keep one of the two",
                )
            )
            continue
        first_lines[key] = key_line
        values[key] = _build(value_node, (*path, key), tree)
        # The place of a key is the key itself: an editor jumps to the start of the line's word.
        mark = tree.marks[(*path, key)]
        mark.line, mark.column = key_line, key_column
    return values


def plain_scalar(text: str) -> Any:
    """The value of an unquoted YAML scalar by YAML 1.2's core schema."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE"):
        return True
    if text in ("false", "False", "FALSE"):
        return False
    if text.lower() in _YAML_11_WORDS:
        return PlainWord(text)
    if _INT.fullmatch(text):
        return int(text) if len(text) < 4000 else text
    if _FLOAT.fullmatch(text) and not re.fullmatch(r"[-+]?0[0-9]+", text):
        return float(text)
    if text.lower() in (".inf", "+.inf", "-.inf", ".nan"):
        return math.nan if text.lower() == ".nan" else math.copysign(math.inf, -1 if text[0] == "-" else 1)
    return text


def _apply_overrides(tree: Tree, overrides: Iterable[str]) -> list[Problem]:
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            problems.append(
                Problem(f"expected key=value, found {override!r}", "command line", "write e.g. ticks.dim=32")
            )
            continue
        try:
            given = parse_yaml(text, "command line") if text.strip() else Tree("command line")
        except RecipeError as error:
            problems += [Problem(p.message, f"command line: {key}", p.fix) for p in error.problems]
            continue
        problems += [Problem(p.message, f"command line: {key}", p.fix) for p in given.problems]
        parent = tree.values
        for part in path[:-1]:
            if isinstance(parent, dict) and isinstance(parent.get(part), str) and part in _SPLITS:
                parent[part] = {"path": parent[part]}
            if not isinstance(parent, dict) or not isinstance(parent.setdefault(part, {}), dict):
                parent = None
                break
            parent = parent[part]
        if not isinstance(parent, dict):
            problems.append(Problem("a value above it is not a group of keys", f"command line: {key}"))
            continue
        parent[path[-1]] = _from_working_directory(path, given.values)
        tree.command_line.add(path)
    return problems


def _from_working_directory(path: Path_, value: Any) -> Any:
    # Paths in a recipe are relative to the recipe; on the command line, to the working directory.
    if path[0] == "data" and len(path) > 1 and path[1] in _SPLITS:
        if isinstance(value, dict) and isinstance(value.get("path"), str) and "$" not in value["path"]:
            return {**value, "path": os.path.abspath(os.path.expanduser(value["path"]))}
        if isinstance(value, str) and path[2:] in ((), ("path",)) and "$" not in value:
            return os.path.abspath(os.path.expanduser(value))
    if path == ("base", "model") and isinstance(value, str) and os.path.isdir(os.path.expanduser(value)):
        return os.path.abspath(os.path.expanduser(value))
    return value


def _with_task_defaults(values: dict[str, Any]) -> dict[str, Any]:
    row = TASKS.get(values["task"]) if isinstance(values.get("task"), str) else None
    if row is None:
        return values
    merged = dict(values)
    for key, default in row.defaults.items():
        section, name = key.split(".")
        if isinstance(merged.get(section, {}), dict):
            merged[section] = {name: default, **merged.get(section, {})}
    training = values.get("training")
    if isinstance(training, dict) and training.get("batch_tokens") is not None and "batch_size" not in training:
        merged["training"] = {**merged["training"], "batch_size": None}
    return merged


def _problem(tree: Tree, detail: Any) -> Problem:
    path = tuple(detail["loc"])
    where = tree.where(path)
    kind, context, found = detail["type"], detail.get("ctx", {}), detail.get("input")
    if kind == "extra_forbidden":
        return Problem("unknown key", where, _suggest(path))
    if kind == "missing":
        return Problem("this key is needed", where, _help_of(path))
    if kind == "value_error":
        said = str(context["error"])  # of an unquoted word it shows the value itself
        return Problem(said if said.startswith("unquoted") else f"{said}, found {_shown(tree, path, found)}", where)
    if kind == "string_pattern_mismatch":
        return Problem(f"expected {_help_of(path).rstrip('.')}, found {_shown(tree, path, found)}", where)
    if path == ("version",) and isinstance(found, int) and found > SCHEMA_VERSION:
        return Problem(
            f"the recipe is written for version {found} of the recipe grammar, this ticktune reads {SCHEMA_VERSION}",
            where,
            "pip install --upgrade ticktune",
        )
    if kind == "literal_error":
        expected = context["expected"].replace("'", "")
        fix = _named(path, found, re.findall(r"'([^']*)'", context["expected"]))
        return Problem(f"expected {expected}, found {_shown(tree, path, found)}", where, fix)
    expected, fix = _expected(kind, context)
    mark = tree.marks.get(path)
    if found is None:
        fix = _not_null(path) or fix
    elif kind.startswith("string") and mark and not mark.quoted and not isinstance(found, str | dict | list):
        fix = f'quote it: "{mark.text}"'
    elif kind.startswith(("int", "float")) and isinstance(found, str):
        fix = "remove the quotes" if mark and mark.quoted and _FLOAT.fullmatch(found) else fix
    elif kind.startswith("bool") and isinstance(found, str):
        fix = "write true or false"
    return Problem(f"expected {expected}, found {_shown(tree, path, found)}", where, fix)


def _named(path: Path_, found: Any, names: list[str]) -> str:
    """How one of some names is written, instead of what was found."""
    if found is None:
        return _not_null(path)
    word = str(found).lower()
    if "off" in names and word in ("true", "yes", "on"):
        return f"write {' or '.join(name for name in names if name != 'off')}"
    if "off" in names and word in ("false", "no"):
        return "write off"
    near = difflib.get_close_matches(str(found), names, 1)
    return f"did you mean {near[0]}?" if near else ""


def _not_null(path: Path_) -> str:
    model = _model_at(path[:-1])
    info = model.model_fields.get(str(path[-1])) if model else None
    return "write a value, or leave the key out: it has a default" if info and not info.is_required() else ""


def _expected(kind: str, context: dict[str, Any]) -> tuple[str, str]:
    bounds = {
        "greater_than": ("gt", "a number above {}"),
        "greater_than_equal": ("ge", "a number of at least {}"),
        "less_than": ("lt", "a number below {}"),
        "less_than_equal": ("le", "a number of at most {}"),
    }
    if kind in bounds:
        name, text = bounds[kind]
        return text.format(context[name]), ""
    if kind.startswith("int"):
        return "a whole number", "write it without a point, quotes or leading zeros, such as 8"
    if kind.startswith("float"):
        return "a number", "write a number such as 1e-4"
    if kind.startswith("bool"):
        return "true or false", "write true or false"
    if kind == "finite_number":
        return "a finite number", ""
    if kind.startswith("string"):
        return "text", ""
    if kind.startswith(("model", "dict")):
        return "a group of keys and values", ""
    if kind.startswith(("list", "too_")):
        size = context.get("min_length", context.get("max_length"))
        return "a list" + (f" of {size}" if size else ""), ""
    return kind.replace("_", " "), ""


def _shown(tree: Tree, path: Path_, found: Any) -> str:
    mark = tree.marks.get(path)
    if isinstance(found, list) and found and not any(isinstance(item, dict | list) for item in found):
        text = f"[{', '.join(map(str, found))}]"
    elif isinstance(found, dict | list):
        text = _kind(found)
    elif found is None:
        text = "null" if tree.is_from_command_line(path) or (mark and mark.text) else _kind(None)
    elif mark and not tree.is_from_command_line(path) and (mark.text or mark.quoted):
        text = f'"{mark.text}"' if mark.quoted else mark.text
    else:
        text = str(found).lower() if isinstance(found, bool) else str(found)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a group of keys"
    return "a list" if isinstance(value, list) else f"{value!r}"


def _model_at(path: Path_) -> type[BaseModel] | None:
    model: type[BaseModel] | None = Recipe
    for part in path:
        info = model.model_fields.get(str(part)) if model else None
        model = _model_in(info.annotation) if info else None
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType):
        return next((m for a in typing.get_args(annotation) if (m := _model_in(a))), None)
    return None


def _all_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    keys = []
    for name, info in model.model_fields.items():
        keys.append(prefix + name)
        inner = _model_in(info.annotation)
        if inner:
            keys += _all_keys(inner, f"{prefix}{name}.")
    return keys


def _suggest(path: Path_) -> str:
    name, parent = str(path[-1]), dotted(path[:-1])
    model = _model_at(path[:-1])
    siblings = list(model.model_fields) if model else []
    elsewhere = [key for key in _all_keys() if key.rsplit(".")[-1] == name]
    near = difflib.get_close_matches(name, siblings, 1, cutoff=0.7)
    if near:
        return f"did you mean {dotted((*path[:-1], near[0]))}?"
    if name in _ELSEWHERE_CALLED:
        return f"here it is called {_ELSEWHERE_CALLED[name]}"
    if elsewhere:
        return f"it belongs to {' or '.join(elsewhere[:3])}"
    leaves = {key.rsplit(".")[-1]: key for key in reversed(_all_keys())}
    near = difflib.get_close_matches(name, leaves, 1, cutoff=0.75)
    if near:
        return f"did you mean {leaves[near[0]]}?"
    return f"known keys {f'under {parent}' if parent else 'here'}: {', '.join(siblings)}" if siblings else ""


def _help_of(path: Path_) -> str:
    model = _model_at(path[:-1])
    info = model.model_fields.get(str(path[-1])) if model else None
    section = _model_in(info.annotation) if info else None
    text = (info.description if info else None) or (section.__doc__ if section else None) or ""
    return " ".join(text.split())


def _line_of(problem: Problem) -> tuple[int, int]:
    numbers = re.search(r":(\d+):(\d+)", problem.where)
    return (int(numbers[1]), int(numbers[2])) if numbers else (10**9, 0)
