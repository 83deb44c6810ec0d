"""Merged folders, opened by stock transformers and exported by torch.onnx, run in ONNX Runtime."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ticktune
from tests.consumers.conftest import Record
from tests.consumers.support import agreement, attach, train

pytestmark = [pytest.mark.consumers, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def _installed() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")


def _run(model: nn.Module, exported_on: dict[str, Any], batch: dict[str, Any], path: Path) -> Any:
    """Exports with free batch size and length, and runs another batch."""
    import onnxruntime

    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = dict.fromkeys(exported_on, free)
    torch.onnx.export(
        model, (), kwargs=exported_on, f=path, dynamo=True, dynamic_shapes=shapes, verbose=False, external_data=False
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {given.name: batch[given.name].numpy() for given in session.get_inputs()})[0]


def test_bert(minilm: Path, tmp_path: Path, record: Record) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    torch.manual_seed(0)
    model = attach(AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=5))
    nn.init.normal_(model.classifier.weight, std=0.2)
    first = tokenizer(["a fine film", "not so fine a film"], padding=True, return_tensors="pt")
    batch = tokenizer(
        ["rain", "the parcel is late", "I want my money back, all of it"], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        without = model(**batch).logits
        ours = train(model)(**batch).logits
    ticktune.merge(model, tmp_path / "merged", tokenizer=tokenizer)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    theirs = _run(stock, dict(first), dict(batch), tmp_path / "model.onnx")
    found = agreement(theirs, ours, without)
    record("ONNX Runtime", "onnxruntime", "BERT (MiniLM-L6)", "real", "logits", found)


def test_llama_with_biases(stories: Path, tmp_path: Path, record: Record) -> None:
    from transformers import AutoModelForCausalLM

    model = attach(AutoModelForCausalLM.from_pretrained(stories), form="plain")
    model.config.use_cache = False
    first, ids = torch.randint(3, 512, (2, 7)), torch.randint(3, 512, (3, 19))
    with torch.no_grad():
        without = model(ids).logits
        ours = train(model)(ids).logits
    ticktune.merge(model, tmp_path / "merged")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert stock.config.mlp_bias
    stock.config.use_cache = False
    theirs = _run(stock, {"input_ids": first}, {"input_ids": ids}, tmp_path / "model.onnx")
    found = agreement(theirs, ours, without)
    record("ONNX Runtime", "onnxruntime", "Llama, plain ticks", "real", "logits", found)
