"""Sentence embedding: texts become vectors whose cosine says how much they mean the same."""

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ticktune.console import figure
from ticktune.errors import BaseModelError, DataError
from ticktune.tasks.task import Batch, EncodingReport, Example, Row, Task, TaskOptions

TEMPERATURE = 0.05
_SHOWN = 6
_POOLING = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
"""Kinds of pooling, as sentence-transformers names them, and the entry of a pooling config that chooses each."""


@dataclass(frozen=True)
class SentenceEmbedding(Task):
    """The task, configured.

    Args:
        options: What the recipe says; its columns are ``text`` and ``text_pair``, and ``score`` or not.
        tokenizer: The base's tokenizer.
        pooling: How the hidden states of a text become one vector; a key of ``_POOLING``.
        is_unit: Whether an embedding is scaled to length one.
        size: Numbers of an embedding.
        lowest: Score of two texts that have nothing in common, the least of the training rows; it is the cosine 0.
        highest: Score of two texts that mean the same, the cosine 1.
    """

    options: TaskOptions
    tokenizer: Any
    pooling: str
    is_unit: bool
    size: int
    lowest: float = 0.0
    highest: float = 1.0
    name: str = "sentence-embedding"
    auto_class: str = "AutoModel"

    @property
    def default_metric(self) -> str:
        """Spearman's correlation with scores; without scores, the mean reciprocal rank of the right partner."""
        return "spearman" if self._is_scored else "mrr"

    def state(self) -> dict[str, Any]:
        """Pooling and the range of the scores."""
        return {
            "pooling": self.pooling,
            "is_unit": self.is_unit,
            "size": self.size,
            "lowest": self.lowest,
            "highest": self.highest,
        }

    def row_of(self, text: str) -> Row:
        """The text, to be embedded."""
        return {"text": text.rstrip("\r")}

    def check(self, rows: Sequence[Row], where: Callable[[int], str]) -> None:
        """Refuses rows whose score is no number, or that have none where scores were learned.

        Raises:
            DataError: Naming the first such row.
        """
        if len(rows) and self._is_scored and "score" not in rows[0]:
            raise DataError(
                "the column score is missing, and the rows that the model learns from have it",
                where=where(0),
                fix="give all files the same columns, or say in data.columns which are read",
            )
        for i, row in enumerate(rows):
            if "score" in row and _number(row["score"]) is None:
                raise DataError(
                    f"expected a finite number as score, found {row['score']!r}",
                    where=where(i),
                    fix="fill it in or remove the row",
                )

    def encode(self, rows: Sequence[Row], first: int, report: EncodingReport, *, labelled: bool) -> list[Example]:
        """Tokenises both texts of a row, or its one text; a text that is too long loses its end."""
        names = [name for name in ("text", "text_pair") if name in rows[0]] if rows else []
        found: dict[str, list[list[int]]] = {}
        is_cut = [False] * len(rows)
        for name in names:
            texts = [str(row[name]) for row in rows]
            whole = self.tokenizer(texts, verbose=False)["input_ids"]
            cut = self.tokenizer(texts, truncation=True, max_length=self.options.max_length)["input_ids"]
            # An empty text, and a tokenizer that adds nothing to it: a model needs one token at least.
            found[name] = [ids or [int(self.tokenizer.pad_token_id)] for ids in cut]
            is_cut = [so_far or len(a) > len(b) for so_far, a, b in zip(is_cut, whole, cut, strict=True)]
        examples: list[Example] = []
        for i, row in enumerate(rows):
            example: Example = {"row": first + i, **{name: found[name][i] for name in names}}
            example["length"] = max(len(example[name]) for name in names)
            if labelled and self._is_scored:
                example["target"] = (float(row["score"]) - self.lowest) / (self.highest - self.lowest)
            if is_cut[i]:
                report.truncated.append(first + i)
            examples.append(example)
        return examples

    def show(self, example: Example) -> list[tuple[str, str]]:
        """Both texts with their special tokens, and the cosine that is learned."""
        learned = f"cosine {figure(example['target'])}" if self._is_scored else "nearest of the batch"
        texts = [("context", self.tokenizer.decode(example[name])) for name in ("text", "text_pair")]
        return [*texts, ("learned", learned)]

    def collate(self, examples: Sequence[Example], *, seed: int | None = None) -> Batch:
        """Pads the texts of all rows, and then their partners, on the right: (2 x rows, seq) int64.

        Of single texts it is (rows, seq). ``row`` is (rows,) int64, and ``target``, the cosine, (rows,) float32.
        """
        texts = [e[name] for name in ("text", "text_pair") if name in examples[0] for e in examples]
        longest = max(map(len, texts))
        pad = int(self.tokenizer.pad_token_id)
        batch: Batch = {
            "row": torch.tensor([e["row"] for e in examples]),  # first: what has as many entries as the batch has rows
            "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids in texts]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in texts]),
        }
        if "target" in examples[0]:
            batch["target"] = torch.tensor([e["target"] for e in examples], dtype=torch.float32)
        return batch

    def weight(self, batch: Batch) -> float:
        """The number of rows."""
        return float(len(batch["row"]))

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Token ids and mask, (texts, seq) int64."""
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

    def logits(self, outputs: Any) -> Tensor:
        """The hidden states of all tokens, (texts, seq, hidden)."""
        hidden: Tensor = outputs["last_hidden_state"]
        return hidden

    def embed(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Hidden states (texts, seq, hidden) and their mask (texts, seq) -> embeddings (texts, hidden), float32."""
        hidden, weight = hidden.float(), mask[..., None].float()
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        elif self.pooling == "max":
            pooled = hidden.masked_fill(weight == 0, -math.inf).amax(1)
        elif self.pooling == "lasttoken":
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
        else:
            count = weight.sum(1)
            pooled = (hidden * weight).sum(1) / (count.sqrt() if self.pooling == "mean_sqrt_len_tokens" else count)
        return F.normalize(pooled) if self.is_unit else pooled

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Squared error of the cosine; without scores, cross entropy of the right partner among all of the batch.

        That is the multiple negatives ranking loss (Henderson et al. 2017, arXiv 1705.00652) with the cosine divided
        by 0.05, except that partners that are the same text are not held against each other. Summed over rows.
        """
        return self._loss(self.embed(self.logits(outputs), batch["attention_mask"]), batch)

    def _loss(self, embeddings: Tensor, batch: Batch) -> Tensor:
        ours, theirs = F.normalize(embeddings).chunk(2)
        if self._is_scored:
            return F.mse_loss((ours * theirs).sum(1), batch["target"], reduction="sum")
        scores = ours @ theirs.T / TEMPERATURE
        ids = batch["input_ids"][len(ours) :]
        same = (ids[:, None] == ids[None]).all(-1)
        same.fill_diagonal_(False)
        target = torch.arange(len(ours), device=scores.device)
        return F.cross_entropy(scores.masked_fill(same, -math.inf), target, reduction="sum")

    def counted(self, batch: Batch) -> Tensor | None:
        """The positions that are no padding, (texts, seq)."""
        mask: Tensor = batch["attention_mask"]
        return mask.bool()

    def decide(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing is decided: zeros, (texts,)."""
        return torch.zeros(len(logits), dtype=torch.long), torch.full((len(logits),), math.inf)

    def metrics(self) -> Any:
        """Correlations of cosine and score; without scores, where the right partner stands among those of all rows."""
        from torchmetrics import MeanMetric, PearsonCorrCoef, SpearmanCorrCoef

        if not self._is_scored:
            ranks = _Ranks()
            return nn.ModuleDict({"mrr": _Rank(ranks, 0), "hit1": _Rank(ranks, 1), "loss": MeanMetric()})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that it keeps all values, which it must
            spearman = SpearmanCorrCoef()
        return nn.ModuleDict({"spearman": spearman, "pearson": PearsonCorrCoef(), "loss": MeanMetric()})

    def update(self, metrics: Any, logits: Tensor, batch: Batch) -> None:
        """Adds a batch."""
        embeddings = self.embed(logits, batch["attention_mask"])
        ours, theirs = F.normalize(embeddings).chunk(2)
        count = len(ours)
        metrics["loss"].update(self._loss(embeddings, batch) / count, weight=count)
        if not self._is_scored:
            metrics["mrr"].ranks.update(ours, theirs)
            return
        cosine = (ours * theirs).sum(1)
        for name in ("spearman", "pearson"):
            metrics[name].update(cosine, batch["target"])

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """The embedding of one text, or the cosine of two."""
        embeddings = self.embed(self.logits(self.forward(model, batch)), batch["attention_mask"]).cpu()
        if len(embeddings) == len(batch["row"]):
            return [{"embedding": values} for values in embeddings.tolist()]
        ours, theirs = F.normalize(embeddings).chunk(2)
        return [{"cosine": value} for value in (ours * theirs).sum(1).tolist()]

    def describe(self, answer: dict[str, Any]) -> str:
        """The cosine, or the first few numbers of the embedding."""
        if "cosine" in answer:
            return figure(answer["cosine"])
        values = answer["embedding"]
        return f"{' '.join(f'{value:+.4f}' for value in values[:_SHOWN])} ... ({len(values)} numbers)"

    def extra_files(self, base_directory: Path) -> dict[str, str]:
        """What makes the folder one of sentence-transformers too: the base's own files, or new ones."""
        modules = _modules_of(base_directory)
        if modules is not None and modules[0]["path"] == "":
            names = ["modules.json", "config_sentence_transformers.json"]
            names += sorted(path.name for path in base_directory.glob("sentence_*_config.json"))
            names += [f"{m['path']}/config.json" for m in modules if m["path"]]
            files = {name: base_directory / name for name in names}
            return {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
        kinds = ["Transformer", "Pooling", *(["Normalize"] if self.is_unit else [])]
        pooling = {key: kind == self.pooling for kind, key in _POOLING.items()}
        documents: dict[str, Any] = {
            "modules.json": [
                {
                    "idx": i,
                    "name": str(i),
                    "path": f"{i}_{kind}" if i else "",
                    "type": f"sentence_transformers.models.{kind}",
                }
                for i, kind in enumerate(kinds)
            ],
            "1_Pooling/config.json": {"word_embedding_dimension": self.size, **pooling},
            "sentence_bert_config.json": {"max_seq_length": self.options.max_length, "do_lower_case": False},
            "config_sentence_transformers.json": {"prompts": {}, "default_prompt_name": None},
        }
        return {name: json.dumps(document, indent=2) + "\n" for name, document in documents.items()}

    @property
    def _is_scored(self) -> bool:
        return "score" in self.options.columns


def build(
    options: TaskOptions, rows: Sequence[Row], where: Callable[[int], str], tokenizer: Any, base_config: Any
) -> SentenceEmbedding:
    """Reads the range of the scores off the training rows, and the pooling off the base's files.

    Raises:
        DataError: A score is no number, or all are the same.
        BaseModelError: The base has a decoder too, or makes its embeddings in a way that is not known here.
    """
    if getattr(base_config, "is_encoder_decoder", False):
        raise BaseModelError(
            f"{base_config.model_type} has an encoder and a decoder, expected an encoder alone",
            where="base.model",
            fix="use a base such as MiniLM, MPNet or BERT",
        )
    pooling, is_unit = _pooling_of(Path(str(base_config.name_or_path)))
    scores = [row["score"] for row in rows] if "score" in options.columns else [0.0, 1.0]
    numbers = [_number(score) for score in scores]
    for i, number in enumerate(numbers):
        if number is None:
            raise DataError(
                f"expected a finite number as score, found {scores[i]!r}",
                where=where(i),
                fix="fill it in or remove the row",
            )
    known = [number for number in numbers if number is not None]
    lowest, highest = min(known), max(known)
    if lowest == highest:
        raise DataError(
            f"all rows have the same score, {lowest:g}: nothing can be learned",
            where=where(0).rpartition(":")[0],
            fix="leave the column out: then each text's own partner is learned",
        )
    size = int(base_config.get_text_config().hidden_size)
    return SentenceEmbedding(options, tokenizer, pooling, is_unit, size, lowest, highest)


def restore(options: TaskOptions, state: dict[str, Any], tokenizer: Any) -> SentenceEmbedding:
    """The task as :meth:`SentenceEmbedding.state` recorded it."""
    return SentenceEmbedding(options, tokenizer, **state)


class _Ranks:
    """Embeddings of all rows, and where each text's own partner stands among all partners."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def update(self, ours: Tensor, theirs: Tensor) -> None:
        """Adds rows: two tensors (rows, hidden) of length one."""
        self.pairs.append((ours.cpu(), theirs.cpu()))

    def places(self) -> Tensor:
        """The place of each row's partner, from 1; equal ones, such as the same text, do not stand before it."""
        if not self.pairs:
            return torch.tensor([])
        ours, theirs = (torch.cat([pair[i] for pair in self.pairs]) for i in (0, 1))
        own = (ours * theirs).sum(1, keepdim=True)
        # In parts: all cosines of 100,000 rows at once would be 40 GB. The margin is what float32 sums may differ by.
        parts = zip(ours.split(1024), own.split(1024), strict=True)
        return torch.cat([1 + (part @ theirs.T > mine + 1e-6).sum(1) for part, mine in parts])


class _Rank(nn.Module):
    """Mean reciprocal rank, or the share of rows whose partner stands among the first so many."""

    def __init__(self, ranks: _Ranks, among: int) -> None:
        super().__init__()
        self.ranks, self.among = ranks, among

    def compute(self) -> float:
        """The score; NaN without rows."""
        places = self.ranks.places()
        values = (places <= self.among).float() if self.among else 1 / places
        return float(values.mean())


def _modules_of(directory: Path) -> list[dict[str, Any]] | None:
    """The modules of a folder of sentence-transformers; None: it is none."""
    path = directory / "modules.json"
    if not path.is_file():
        return None
    modules = _read(path)
    if not isinstance(modules, list) or not all(isinstance(m, dict) and {"type", "path"} <= m.keys() for m in modules):
        raise BaseModelError("expected a list of modules, each with type and path", where=str(path))
    return modules


def _pooling_of(directory: Path) -> tuple[str, bool]:
    """How a base's files say that embeddings are made: pooling, and whether they have length one; else the mean."""
    modules = _modules_of(directory)
    if modules is None:
        return "mean", False
    kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise BaseModelError(
            f"its embeddings are made by {', '.join(kinds)}; expected Transformer, Pooling and perhaps Normalize",
            where=str(directory / "modules.json"),
            fix="choose a base without further layers after its encoder",
        )
    path = directory / str(modules[1]["path"]) / "config.json"
    entries = _read(path)
    entries = entries if isinstance(entries, dict) else {}
    known = {key: kind for kind, key in _POOLING.items()}
    is_on = [key for key, value in entries.items() if key.startswith("pooling_mode_") and value is True]
    chosen = [str(known.get(key, key)) for key in is_on]
    if "pooling_mode" in entries:
        chosen = [str(entries["pooling_mode"])]
    if len(chosen) != 1 or chosen[0] not in _POOLING:
        raise BaseModelError(
            f"it pools by {', '.join(chosen) or 'nothing'}, expected one of {', '.join(_POOLING)}", where=str(path)
        )
    return chosen[0], "Normalize" in kinds


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"it cannot be read as JSON: {error}", where=str(path)) from error


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
