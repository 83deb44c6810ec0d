"""Versions of ticktune and of what it stands on, for run records; packages that only some tasks need."""

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from ticktune.errors import Problem, UsageError

FLOORS = {"torch": "2.10", "transformers": "5.3", "safetensors": "0.5.3", "jinja2": "3.1.5"}
"""Below these, files of others could run code here (CVE-2025-32434, CVE-2026-24747, CVE-2026-1839, CVE-2026-4372,
CVE-2024-56326), or writing could lose the old file; pyproject.toml asks for no less."""

_PACKAGES = (
    "ticktune",
    "torch",
    "transformers",
    "datasets",
    "tokenizers",
    "safetensors",
    "torchmetrics",
    "numpy",
    "torchao",
    "bitsandbytes",
)


def versions() -> dict[str, str]:
    """Returns package -> installed version."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def refuse_old() -> None:
    """Refuses to start on versions with known holes; an installation by hand can get past what pip asks for.

    Raises:
        UsageError: Naming each package that is too old.
    """
    problems = []
    for package, floor in FLOORS.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            continue  # its import says so
        if _numbers(found) < _numbers(floor):
            problems.append(
                Problem(
                    f"{package} {found} has known security holes, expected {floor} or newer",
                    fix=f"pip install --upgrade '{package}>={floor}'",
                )
            )
    if problems:
        raise UsageError(problems)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text.partition("+")[0])[:3]]


def require(module: str, extra: str) -> None:
    """Refuses to go on without a package that only some tasks need.

    Args:
        module: Its name in an import.
        extra: The extra of ticktune that installs it.

    Raises:
        UsageError: It is not installed.
    """
    if find_spec(module) is None:
        raise UsageError(
            f"this task needs the package {module}, which is not installed", fix=f"pip install 'ticktune[{extra}]'"
        )
