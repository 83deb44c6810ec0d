"""Tiny tasks, batches and loops for tests that train."""

import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from ticktune.data.batches import micro_batches
from ticktune.data.encode import Encoded
from ticktune.device import Compute
from ticktune.patch.attach import adapter_parameters, adapter_state
from ticktune.recipe.schema import Optimizer, Schedule
from ticktune.tasks.causal_lm import CausalLm
from ticktune.tasks.task import Batch, EncodingReport, TaskOptions
from ticktune.tasks.text_classification import TextClassification
from ticktune.train.graphs import Graphs
from ticktune.train.groups import build_optimizer, lr_factor
from ticktune.train.head_loss import LossOf
from ticktune.train.steps import Around, StepReport, train_steps

CPU = Compute(torch.device("cpu"), "fp32")
CPU_FP16 = Compute(torch.device("cpu"), "fp16")


@dataclass
class Work:
    """A model without ticks, a task, and its encoded rows."""

    model: nn.Module
    task: Any
    examples: Encoded

    def batches(self, size: int, micro: int | None = None) -> list[list[Batch]]:
        """All rows in order, as batches of micro-batches."""
        whole = micro_batches(range(len(self.examples)), size)
        return [
            [self.task.collate(self.examples.take(part)) for part in micro_batches(numbers, micro or size)]
            for numbers in whole
        ]


def classification(folder: Path, rows: int = 24) -> Work:
    """Two classes on texts of ragged length; the head's values depend on the random state."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = TextClassification(TaskOptions(("text", "label"), 32), "single", ("a", "b"), tokenizer)
    rng = random.Random(3)
    data = [{"text": _words(rng, 1, 12), "label": rng.choice("ab")} for _ in range(rows)]
    return Work(model, task, _encoded(task, data))


def causal_lm(folder: Path, rows: int = 24) -> Work:
    """Prompts and responses of ragged length, so each row has another number of learned tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = CausalLm(TaskOptions(("prompt", "response"), 32), tokenizer)
    rng = random.Random(3)
    data = [{"prompt": _words(rng, 1, 9), "response": _words(rng, 1, 14)} for _ in range(rows)]
    return Work(model, task, _encoded(task, data))


def optimizer_of(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    """The optimizer of a run."""
    return build_optimizer(adapter_parameters(model), Optimizer(**options))


def steps(
    work: Work,
    batches: Sequence[list[Batch]],
    optimizer: torch.optim.Optimizer,
    *,
    scaler: torch.amp.GradScaler | None = None,
    compute: Compute = CPU,
    clip: float | None = 1.0,
    seed: int = 7,
    base_dropout: bool = True,
    first_step: int = 0,
    loss_of: LossOf | None = None,
    around: Around = nullcontext,
    graphs: Graphs | None = None,
) -> Iterator[StepReport]:
    """The training loop on a schedule of 20 steps."""
    return train_steps(
        work.model,
        [(key, parameter) for key, _, parameter in adapter_parameters(work.model)],
        work.task,
        batches,
        optimizer,
        compute.scaler() if scaler is None else scaler,
        compute,
        lr_factor=lambda step: lr_factor(step, 20, Schedule()),
        clip=clip,
        seed=seed,
        base_dropout=base_dropout,
        first_step=first_step,
        loss_of=loss_of,
        around=around,
        graphs=graphs,
    )


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of everything that is trained."""
    return {key: tensor.clone() for key, tensor in adapter_state(model).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are the same, bit for bit."""
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and bits(a[key]) == bits(b[key]) for key in a)


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor; unlike ``torch.equal`` they tell 0 from -0, and NaN equals itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _encoded(task: Any, rows: list[dict[str, str]]) -> Encoded:
    report = EncodingReport()
    examples = task.encode(rows, 0, report, labelled=True)
    return Encoded(Dataset.from_list(examples), [e["length"] for e in examples], report, None)  # type: ignore[arg-type]


def _words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(f"w{rng.randrange(60)}" for _ in range(rng.randint(low, high)))
