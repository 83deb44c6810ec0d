"""Small models that learn a part of the real data first, as no pretrained weights of their kind are at hand.

A recipe names the Hub model that a person would use; a test gives it one of these instead. Each is trained from
nothing for some seconds on rows that the fine-tuning does not see or does not ask about, so what is fine-tuned has
learned something real, at a small scale.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Batches = Iterator[dict[str, Tensor]]


def learn(model: nn.Module, batches: Callable[[], Batches], steps: int, lr: float = 1e-3) -> nn.Module:
    """Trains a whole model from nothing with AdamW and a one-cycle learning rate; returns it in evaluation mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    step = 0
    while step < steps:
        for batch in batches():
            loss = model(**batch).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            if step == steps:
                break
    return model.eval()


def shuffled(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yields row numbers in batches, in a random order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    yield from order.split(size)


def digits(folder: Path, split: str, names: str) -> tuple[list[Path], Tensor]:
    """Files of written digits and their places in ``names``."""
    files = [(path, names.index(n)) for n in names for path in sorted((folder / "mnist_3k" / split / n).iterdir())]
    return [path for path, _ in files], torch.tensor([label for _, label in files])


def image_model(data: Path, target: Path, config: Any, *, size: int, steps: int = 250) -> Path:
    """Trains an image classifier of any architecture on the digits 0 to 4, and saves its body and image processor.

    Args:
        data: Folder of the data sets.
        target: Where the model is saved.
        config: Of a small model for pictures of ``size`` x ``size``.
        size: Pixels.
        steps: Of training.
    """
    from PIL import Image
    from transformers import AutoModelForImageClassification, ViTImageProcessorPil

    torch.manual_seed(0)
    config.num_labels = 5
    model = AutoModelForImageClassification.from_config(config)
    processor = ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    paths, labels = digits(data, "train", "01234")
    images = [Image.open(path).convert("RGB") for path in paths]
    pixels = processor(images, return_tensors="pt")["pixel_values"]

    def batches() -> Batches:
        for rows in shuffled(len(labels), 32, 0):
            yield {"pixel_values": pixels[rows], "labels": labels[rows]}

    learn(model, batches, steps)
    model.base_model.save_pretrained(target)
    processor.save_pretrained(target)
    return target
