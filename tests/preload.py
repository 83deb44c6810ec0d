"""What the commands import, imported once for those that tests/launch.py starts."""

import importlib
import os
import pkgutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets  # noqa: F401
import sklearn.metrics  # noqa: F401
import torch
import torch.utils.flop_counter
import torchmetrics  # noqa: F401
import transformers.modeling_utils
import transformers.models.auto.modeling_auto  # noqa: F401

import ticktune

for module in pkgutil.walk_packages(ticktune.__path__, "ticktune."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
torch.set_num_threads(1)
