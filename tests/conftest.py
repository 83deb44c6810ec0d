"""Fixtures that several folders of tests share: tiny models, real data, the command line."""

import os

# Tiny models are slower on several threads; real-data tests choose their own number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tests.models as models
from tests.launch import launch

# The models are tiny: on a busy machine more threads mostly wait for each other, and tests take twice
# as long.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _fixed_random_state() -> None:
    torch.manual_seed(0)


@pytest.fixture
def data_folder() -> Path:
    """The folder of real data sets; tests that need it are skipped where it is not named."""
    folder = os.environ.get("TICKTUNE_DATA")
    if not folder:
        pytest.skip("TICKTUNE_DATA is not set: it names the folder with the real data sets (sst2/, ...)")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved two-layer BERT with a word tokenizer: loads in milliseconds."""
    return models.save_tiny_bert(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved two-layer Llama with a word tokenizer."""
    return models.save_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def ticktune() -> Run:
    """Runs the command line in a process of its own: ``ticktune("train", recipe, cwd=…)``."""
    return launch
