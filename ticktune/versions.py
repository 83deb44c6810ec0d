"""Versions of ticktune and of what it stands on, for run records; packages that only some tasks need."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from ticktune.errors import UsageError

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
