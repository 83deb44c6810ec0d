"""The tasks: plain rows, nothing imported. A new task is one row here, one file and one recipe."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class TaskRow:
    """What the recipe and the commands must know of a task before its module is imported.

    Args:
        module: The module of the task; it has a ``build`` and a ``restore`` function.
        columns: Sets of column names, each of which is enough to train.
        optional_columns: Further columns that the task understands.
        metrics: Names of its metrics; true where more is better.
        label_columns: Columns that hold the answer: ``predict`` can do without them.
        text_columns: Columns whose values must be text; the others keep their kind.
        file_columns: Columns that name files, relative to the file of rows.
        processor: What makes a model's inputs of them: ``tokenizer``, ``image`` (pictures), ``audio`` (sound) or
            ``speech`` (sound, and a tokenizer where there is one).
        documents: Whether a txt file is one document, rather than a row a line.
        keys: Recipe keys that mean something for this task, among those that do not for every one.
        defaults: Recipe keys whose default differs from the schema's, as dotted key -> value.
    """

    module: str
    columns: tuple[frozenset[str], ...]
    metrics: dict[str, bool]
    optional_columns: frozenset[str] = frozenset()
    label_columns: frozenset[str] = frozenset()
    text_columns: frozenset[str] = frozenset()
    file_columns: frozenset[str] = frozenset()
    processor: Literal["tokenizer", "image", "audio", "speech"] = "tokenizer"
    documents: bool = False
    keys: frozenset[str] = frozenset()
    defaults: dict[str, Any] = field(default_factory=dict)


def tasks_with(key: str) -> str:
    """The tasks that a recipe key means something for, in a sentence; empty: all of them."""
    *others, last = [name for name, row in TASKS.items() if key in row.keys] or [""]
    return f"{', '.join(others)} and {last}" if others else last


_LOSS = frozenset({"loss.weights", "loss.label_smoothing"})
_PICTURES = frozenset({"data.augment.flip", "data.augment.crop", "data.augment.jitter"})
_SOUNDS = frozenset({"data.max_seconds", "data.augment.time_mask", "data.augment.noise"})
_TOKENS = frozenset({"training.batch_tokens"})
_ENCODED = _TOKENS | {"training.padding_free"}
_WRITING = frozenset({"evaluation.generate.max_new_tokens", "evaluation.generate.num_beams"})

TASKS: dict[str, TaskRow] = {
    "text-classification": TaskRow(
        module="ticktune.tasks.text_classification",
        columns=(frozenset({"text", "label"}),),
        optional_columns=frozenset({"text_pair"}),
        label_columns=frozenset({"label"}),
        text_columns=frozenset({"text", "text_pair"}),
        metrics={
            "accuracy": True,
            "f1": True,
            "mcc": True,
            "auroc": True,
            "pearson": True,
            "spearman": True,
            "mse": False,
            "ece": False,
            "log_loss": False,
            "loss": False,
        },
        keys=_LOSS | _ENCODED | {"problem", "data.separator", "evaluation.threshold"},
    ),
    "token-classification": TaskRow(
        module="ticktune.tasks.token_classification",
        columns=(frozenset({"tokens", "tags"}),),
        optional_columns=frozenset({"text"}),
        label_columns=frozenset({"tags"}),
        text_columns=frozenset({"text"}),
        metrics={"f1": True, "precision": True, "recall": True, "token_accuracy": True, "loss": False},
        keys=_LOSS | _ENCODED | {"data.overlap"},
    ),
    "question-answering": TaskRow(
        module="ticktune.tasks.question_answering",
        columns=(frozenset({"question", "context", "answers"}),),
        label_columns=frozenset({"answers"}),
        text_columns=frozenset({"question", "context"}),
        metrics={"f1": True, "exact_match": True, "loss": False},
        keys=_ENCODED | {"loss.label_smoothing", "data.overlap"},
        defaults={"data.max_length": 384, "data.overlap": 128},
    ),
    "image-classification": TaskRow(
        module="ticktune.tasks.image_classification",
        columns=(frozenset({"image", "label"}),),
        label_columns=frozenset({"label"}),
        file_columns=frozenset({"image"}),
        processor="image",
        metrics={"accuracy": True, "f1": True, "mcc": True, "auroc": True, "top5": True, "loss": False},
        keys=_LOSS | _PICTURES,
    ),
    "semantic-segmentation": TaskRow(
        module="ticktune.tasks.semantic_segmentation",
        columns=(frozenset({"image", "mask"}),),
        label_columns=frozenset({"mask"}),
        file_columns=frozenset({"image", "mask"}),
        processor="image",
        metrics={"mean_iou": True, "pixel_accuracy": True, "loss": False},
        keys=_LOSS | _PICTURES | {"data.classes"},
    ),
    "object-detection": TaskRow(
        module="ticktune.tasks.object_detection",
        columns=(frozenset({"image", "objects"}),),
        label_columns=frozenset({"objects"}),
        file_columns=frozenset({"image"}),
        processor="image",
        metrics={"map": True, "map50": True, "loss": False},
        keys=_PICTURES | {"loss.weights", "data.classes", "evaluation.threshold"},
    ),
    "audio-classification": TaskRow(
        module="ticktune.tasks.audio_classification",
        columns=(frozenset({"audio", "label"}),),
        label_columns=frozenset({"label"}),
        file_columns=frozenset({"audio"}),
        processor="audio",
        metrics={"accuracy": True, "f1": True, "mcc": True, "auroc": True, "loss": False},
        keys=_LOSS | _SOUNDS,
    ),
    "speech-recognition": TaskRow(
        module="ticktune.tasks.speech_recognition",
        columns=(frozenset({"audio", "text"}),),
        label_columns=frozenset({"text"}),
        text_columns=frozenset({"text"}),
        file_columns=frozenset({"audio"}),
        processor="speech",
        metrics={"wer": False, "cer": False, "loss": False},
        keys=_SOUNDS | _WRITING | {"loss.label_smoothing", "data.vocabulary", "data.language"},
    ),
    "masked-lm": TaskRow(
        module="ticktune.tasks.masked_lm",
        columns=(frozenset({"text"}),),
        text_columns=frozenset({"text"}),
        documents=True,
        metrics={"perplexity": False, "token_accuracy": True, "loss": False},
        keys=_ENCODED | {"loss.label_smoothing"},
        defaults={"data.max_length": 256, "optimizer.lr": 1e-4, "schedule.name": "cosine"},
    ),
    "causal-lm": TaskRow(
        module="ticktune.tasks.causal_lm",
        columns=(frozenset({"text"}), frozenset({"prompt", "response"}), frozenset({"messages"})),
        label_columns=frozenset({"response"}),
        text_columns=frozenset({"text", "prompt", "response"}),
        documents=True,
        metrics={"perplexity": False, "token_accuracy": True, "exact_match": True, "loss": False},
        keys=_WRITING | _TOKENS | {"evaluation.generate.answer", "loss.label_smoothing", "training.packing"},
        defaults={
            "data.max_length": 512,
            "optimizer.lr": 1e-4,
            "schedule.name": "cosine",
            "training.batch_size": 16,
        },
    ),
    "next-item": TaskRow(
        module="ticktune.tasks.next_item",
        columns=(frozenset({"items"}),),
        optional_columns=frozenset({"history"}),
        label_columns=frozenset({"items"}),
        metrics={"ndcg10": True, "hit10": True, "mrr": True, "perplexity": False, "unknown": False, "loss": False},
        keys=_TOKENS | {"loss.label_smoothing"},
        defaults={"data.max_length": 64, "schedule.name": "cosine"},
    ),
    "seq2seq-lm": TaskRow(
        module="ticktune.tasks.seq2seq_lm",
        columns=(frozenset({"source", "target"}),),
        label_columns=frozenset({"target"}),
        text_columns=frozenset({"source", "target"}),
        metrics={
            "perplexity": False,
            "token_accuracy": True,
            "loss": False,
            "bleu": True,
            "chrf": True,
            "rouge_l": True,
        },
        keys=_WRITING | _TOKENS | {"loss.label_smoothing"},
    ),
    "sentence-embedding": TaskRow(
        module="ticktune.tasks.sentence_embedding",
        columns=(frozenset({"text", "text_pair", "score"}), frozenset({"text", "text_pair"})),
        label_columns=frozenset({"text_pair", "score"}),
        text_columns=frozenset({"text", "text_pair"}),
        metrics={"spearman": True, "pearson": True, "mrr": True, "hit1": True, "loss": False},
        keys=frozenset({"training.padding_free"}),
    ),
}
