"""Versions of ticktune and of what it stands on, for run records."""

from importlib.metadata import PackageNotFoundError, version

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
