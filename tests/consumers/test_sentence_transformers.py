"""sentence-transformers opens a merged encoder as a plain folder, and as one of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ticktune
from tests.consumers.conftest import Record
from tests.consumers.support import agreement, attach, train

pytestmark = [pytest.mark.consumers, pytest.mark.filterwarnings("ignore")]

SENTENCES = ["a fine film", "the refund never arrived, please send it again", "rain", "where is my parcel?"]


def _embed(model: nn.Module, tokenizer: Any) -> Tensor:
    """Mean of the hidden states of the real tokens, of length one: what all-MiniLM does."""
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


def test_embeddings_of_a_merged_minilm(minilm: Path, tmp_path: Path, record: Record) -> None:
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    model = attach(AutoModel.from_pretrained(minilm))
    without = _embed(model, tokenizer)
    ours = _embed(train(model), tokenizer)
    ticktune.merge(model, tmp_path / "merged", tokenizer=tokenizer, pad_to=64)

    loaded = st.SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    assert loaded[0].auto_model.config.intermediate_size == 1600
    theirs = loaded.encode(SENTENCES, normalize_embeddings=True)
    found = agreement(theirs, ours, without)
    record("sentence-transformers", "sentence-transformers", "BERT (MiniLM-L6)", "real", "embeddings", found)

    loaded.save(str(tmp_path / "saved"))
    again = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    agreement(again.encode(SENTENCES, normalize_embeddings=True), ours, without)
