"""ticktune: fine-tuning by a few extra hidden units and norms, merged exactly into a stock checkpoint.

    model = ticktune.attach(model, dim=64)          # then any torch loop, or the HF Trainer
    ticktune.save_adapter(model, "adapter/")
    model = ticktune.load_adapter(base, "adapter/")
    ticktune.merge(model, "merged/")

Names resolve on first use, so importing ticktune loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ticktune.adapter import load_adapter, save_adapter
    from ticktune.export.library import merge
    from ticktune.patch.attach import attach, detach

__version__ = "0.1.0"
__all__ = ["__version__", "attach", "detach", "load_adapter", "merge", "save_adapter"]

_HOMES = {
    "attach": "ticktune.patch.attach",
    "detach": "ticktune.patch.attach",
    "load_adapter": "ticktune.adapter",
    "merge": "ticktune.export.library",
    "save_adapter": "ticktune.adapter",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ticktune' has no attribute {name!r}")
