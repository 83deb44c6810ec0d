"""One total order of files: a module imports only modules above it, wherever the import stands."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "ticktune"

ORDER = [
    "ticktune.errors",
    "ticktune.versions",
    "ticktune.files",
    "ticktune.weights",
    "ticktune.console",
    "ticktune.signals",
    "ticktune.limits",
    "ticktune.device",
    "ticktune.quantize",
    "ticktune.registry",
    "ticktune.recipe.schema",
    "ticktune.recipe.check",
    "ticktune.recipe.load",
    "ticktune.tasks.batch",
    "ticktune.tasks.task",
    "ticktune.tasks.classes",
    "ticktune.tasks.text_classification",
    "ticktune.tasks.token_classification",
    "ticktune.tasks.question_answering",
    "ticktune.tasks.pictures",
    "ticktune.tasks.image_classification",
    "ticktune.tasks.answers",
    "ticktune.tasks.semantic_segmentation",
    "ticktune.tasks.object_detection",
    "ticktune.tasks.sounds",
    "ticktune.tasks.audio_classification",
    "ticktune.tasks.speech_recognition",
    "ticktune.tasks.masked_lm",
    "ticktune.tasks.causal_lm",
    "ticktune.tasks.next_item",
    "ticktune.tasks.seq2seq_lm",
    "ticktune.tasks.sentence_embedding",
    "ticktune.diagnosis",
    "ticktune.base",
    "ticktune.patch.ticks",
    "ticktune.patch.fast",
    "ticktune.patch.norms",
    "ticktune.patch.layout",
    "ticktune.patch.shrink",
    "ticktune.patch.proof",
    "ticktune.patch.fields",
    "ticktune.patch.routing",
    "ticktune.patch.detect",
    "ticktune.patch.attach",
    "ticktune.patch.standins",
    "ticktune.patch.wide",
    "ticktune.patch.cpu",
    "ticktune.patch.segments",
    "ticktune.patch.unpadded",
    "ticktune.data.media",
    "ticktune.data.store",
    "ticktune.data.states",
    "ticktune.data.read",
    "ticktune.data.audit",
    "ticktune.data.encode",
    "ticktune.remarks",
    "ticktune.data.batches",
    "ticktune.train.groups",
    "ticktune.train.graphs",
    "ticktune.train.head_loss",
    "ticktune.train.same_loss",
    "ticktune.train.ffn",
    "ticktune.train.steps",
    "ticktune.train.packing",
    "ticktune.train.padding",
    "ticktune.train.prefix",
    "ticktune.train.memory",
    "ticktune.evaluate",
    "ticktune.checkpoint",
    "ticktune.report.markup",
    "ticktune.report.chart",
    "ticktune.report.page",
    "ticktune.report.card",
    "ticktune.adapter",
    "ticktune.export.stock_forward",
    "ticktune.export.express",
    "ticktune.export.widen",
    "ticktune.export.verify",
    "ticktune.export.save",
    "ticktune.export.library",
    "ticktune.folder",
    "ticktune.prepare",
    "ticktune.ways",
    "ticktune.session",
    "ticktune.rows",
    "ticktune.inspect",
    "ticktune.run",
    "ticktune.cli",
    "ticktune.__main__",
    "ticktune",
]


def modules() -> dict[str, Path]:
    """Module name -> file, without the empty inner ``__init__.py`` files."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        if parts[-1] != "__init__":
            found[".".join(parts)] = path
    return found | {"ticktune": ROOT / "__init__.py"}


def imports(source: str, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of a module of ours, inside functions and under TYPE_CHECKING too.

    ``from ticktune import __version__`` reads a constant that stands in the package's own file above anything
    else, and is not counted.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "ticktune":
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            home = node.module or ""
            if home.split(".")[0] != "ticktune":
                continue
            for alias in node.names:
                inner = f"{home}.{alias.name}"
                if inner in known:
                    yield node.lineno, inner
                elif (home, alias.name) != ("ticktune", "__version__"):
                    yield node.lineno, home


def breaches(name: str, source: str, order: list[str]) -> list[str]:
    place = {module: i for i, module in enumerate(order)}
    return [
        f"{name}:{line} imports {other}, which stands later"
        for line, other in imports(source, set(order))
        if place.get(other, len(order)) >= place[name]
    ]


def test_every_module_has_a_place_in_the_order() -> None:
    # A name in the list without a file is one that is still to be written.
    assert sorted(set(modules()) - set(ORDER)) == []


def test_no_module_stands_twice_in_the_order() -> None:
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("name", sorted(set(modules()) & set(ORDER)))
def test_a_module_imports_only_modules_above_it(name: str) -> None:
    assert breaches(name, modules()[name].read_text(encoding="utf-8"), ORDER) == []


@pytest.mark.parametrize(
    "source",
    [
        "import ticktune.run",
        "from ticktune import run",
        "from ticktune.run import train",
        "def f():\n    from ticktune.run import train",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ticktune import run",
        "import ticktune",
        "from ticktune import attach",
    ],
)
def test_the_walk_sees_an_import_of_any_form(source: str) -> None:
    assert len(breaches("ticktune.files", source, ORDER)) == 1


@pytest.mark.parametrize("path", sorted(ROOT.glob("*/__init__.py")), ids=lambda path: path.parent.name)
def test_an_inner_init_is_empty(path: Path) -> None:
    assert path.read_bytes() == b""


def test_the_registry_imports_nothing_of_ticktune() -> None:
    source = (ROOT / "registry.py").read_text(encoding="utf-8")
    assert list(imports(source, set(ORDER))) == []


def test_the_stock_forward_imports_nothing_of_ticktune() -> None:
    source = (ROOT / "export" / "stock_forward.py").read_text(encoding="utf-8")
    assert list(imports(source, set(ORDER))) == []


def test_the_modules_that_the_registry_and_the_package_name_exist() -> None:
    import ticktune
    from ticktune.registry import TASKS

    named = {row.module for row in TASKS.values()} | set(ticktune._HOMES.values())
    assert named <= set(modules())
