"""Audio classification: one label for each sound."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ticktune.tasks.classes import (
    check_known,
    class_answers,
    class_loss,
    class_metrics,
    describe_class,
    label_config,
    label_name,
    read_classes,
    update_classes,
)
from ticktune.tasks.sounds import (
    change_sound,
    check_sounds,
    convolutions_of,
    count_samples,
    read_sound,
    shortest_of,
    sound_inputs,
    unmasked,
)
from ticktune.tasks.task import Batch, EncodingReport, Example, Row, Task, TaskOptions, best_of

_INPUTS = ("input_values", "input_features", "attention_mask")


@dataclass(frozen=True)
class AudioClassification(Task):
    """The task, configured.

    Args:
        options: What the recipe says.
        labels: Names of the classes in the order of the logits.
        weights: Weight of each class in the loss; None: all 1.
        shortest: Samples of the shortest sound that the model can take.
        entries: Further entries of the model's config.
        extractor: The base's feature extractor.
    """

    options: TaskOptions
    labels: tuple[str, ...]
    weights: tuple[float, ...] | None
    shortest: int
    entries: dict[str, Any]
    extractor: Any
    name: str = "audio-classification"
    auto_class: str = "AutoModelForAudioClassification"
    default_metric: str = "accuracy"

    def config(self) -> dict[str, Any]:
        """The label map; a base's own masking of frames is off."""
        return {**label_config(self.labels), **self.entries}

    def state(self) -> dict[str, Any]:
        """Labels, their weights, and what the base's config says of its inputs."""
        weights = None if self.weights is None else list(self.weights)
        return {"labels": list(self.labels), "weights": weights, "shortest": self.shortest, "entries": self.entries}

    def row_of(self, text: str) -> Row:
        """A sound's path."""
        return {"audio": text.strip()}

    def limit(self) -> str:
        """Seconds."""
        return f"data.max_seconds = {self.options.max_seconds:g} seconds"

    def check(self, rows: Sequence[Row], where: Callable[[int], str]) -> None:
        """Refuses files that are no sound, and labels that the training rows lack."""
        check_known([label_name(row["label"]) for row in rows], self.labels, where)
        check_sounds([row["audio"] for row in rows], where)

    def encode(self, rows: Sequence[Row], first: int, report: EncodingReport, *, labelled: bool) -> list[Example]:
        """Notes path, length in samples, and label; sounds are read batch by batch."""
        examples: list[Example] = []
        longest = self.options.max_seconds * self.extractor.sampling_rate
        for i, row in enumerate(rows):
            samples = count_samples(row["audio"], self.extractor.sampling_rate)
            if samples > longest:
                report.truncated.append(first + i)
            example: Example = {"row": first + i, "length": min(samples, int(longest)), "audio": row["audio"]}
            if labelled:
                example["target"] = self.labels.index(label_name(row["label"]))
            examples.append(example)
        return examples

    def show(self, example: Example) -> list[tuple[str, str]]:
        """The sound's path, its length, and the label."""
        seconds = example["length"] / self.extractor.sampling_rate
        return [("context", f"{example['audio']} ({seconds:.2f} s)"), ("learned", self.labels[example["target"]])]

    def collate(self, examples: Sequence[Example], *, seed: int | None = None) -> Batch:
        """Waveforms (batch, samples) or spectrograms (batch, frames, bins) float32; target (batch,) int64."""
        rate, seconds = self.extractor.sampling_rate, self.options.max_seconds
        sounds = [
            change_sound(read_sound(e["audio"], rate, seconds), self.options.augment, seed, e["row"]) for e in examples
        ]
        batch: Batch = dict(sound_inputs(self.extractor, sounds, self.shortest))
        if "target" in examples[0]:
            batch["target"] = torch.tensor([e["target"] for e in examples])
        return batch

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Waveforms or spectrograms, and the mask where the model takes one."""
        return {name: batch[name] for name in _INPUTS if name in batch}

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Cross entropy, summed over rows."""
        return class_loss(outputs.logits, batch["target"], self.weights, self.options.label_smoothing)

    def decide(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The class, (batch,)."""
        return best_of(logits)

    def metrics(self) -> Any:
        """Accuracy, macro F1, MCC, AUROC, loss."""
        return class_metrics(len(self.labels))

    def update(self, metrics: Any, logits: Tensor, batch: Batch) -> None:
        """Adds a batch."""
        update_classes(metrics, logits, batch["target"], class_loss(logits, batch["target"], self.weights, 0.0))

    def predict(self, model: Any, batch: Batch) -> list[dict[str, Any]]:
        """Label and probability of each class."""
        return class_answers(self.logits(self.forward(model, batch)).cpu(), self.labels)

    def describe(self, answer: dict[str, Any]) -> str:
        """Label and probability."""
        return describe_class(answer)


def build(
    options: TaskOptions, rows: Sequence[Row], where: Callable[[int], str], extractor: Any, base_config: Any
) -> AudioClassification:
    """Reads the labels off the training rows.

    Raises:
        DataError: A label is missing, or there is a single class.
    """
    labels, weights = read_classes(rows, options.class_weights, base_config, where)
    shortest = shortest_of(convolutions_of(base_config), extractor.sampling_rate)
    return AudioClassification(options, labels, weights, shortest, unmasked(base_config), extractor)


def restore(options: TaskOptions, state: dict[str, Any], extractor: Any) -> AudioClassification:
    """The task as :meth:`AudioClassification.state` recorded it."""
    weights = None if state["weights"] is None else tuple(state["weights"])
    return AudioClassification(options, tuple(state["labels"]), weights, state["shortest"], state["entries"], extractor)
