"""Rows of next-item -> a base: a small Llama whose tokens are the items, trained on them from nothing.

    python scripts/item_model.py ROWS.jsonl OUTPUT [--steps 100] [--hidden 64] [--layers 2] [--context 64] [--minimum 3]

ROWS.jsonl has a row for each person, with the column items, oldest first (scripts/item_rows.py, or a house's own log).
An item that occurs fewer than --minimum times is the unknown token: of so few times nothing is learned. OUTPUT becomes
a plain transformers folder: config, weights, and a WordLevel tokenizer.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ticktune.tasks.next_item import build
from ticktune.tasks.task import EncodingReport, TaskOptions

SPECIAL = ("<pad>", "<unk>", "<s>")


def item_tokenizer(rows: Sequence[dict[str, Any]], minimum: int) -> Any:
    """A tokenizer whose tokens are the items that occur at least so often, the most frequent first."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    counts = Counter(str(item) for row in rows for item in row["items"])
    items = sorted((item for item, count in counts.items() if count >= minimum), key=lambda item: (-counts[item], item))
    items = [item for item in items if item not in SPECIAL]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate([*SPECIAL, *items])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", bos_token="<s>")


def item_model(
    rows: Sequence[dict[str, Any]],
    *,
    steps: int = 100,
    hidden: int = 64,
    layers: int = 2,
    context: int = 64,
    minimum: int = 3,
    batch_size: int = 32,
    lr: float = 5e-3,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Trains a small Llama on rows.

    Args:
        rows: With the column items.
        steps: Of AdamW with a one-cycle learning rate.
        hidden: Size of an item's vector; the feed-forward block is twice as wide.
        layers: Blocks.
        context: Items that the model sees.
        minimum: How often an item must occur.
        batch_size: Windows of a step.
        lr: Peak learning rate.
        seed: Of weights and order.

    Returns:
        The model, in evaluation mode, and its tokenizer.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = item_tokenizer(rows, minimum)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=2 * hidden, max_position_embeddings=context, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=2, eos_token_id=None,
    )  # fmt: skip
    task = build(TaskOptions(("items",), context), rows, lambda row: f"row {row + 1}", tokenizer, config)
    examples = task.encode(rows, 0, EncodingReport(), labelled=True)
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)

    def batches() -> Iterator[dict[str, Any]]:
        while True:
            for numbers in torch.randperm(len(examples)).split(batch_size):
                yield task.collate([examples[i] for i in numbers.tolist()])

    for _, batch in zip(range(steps), batches(), strict=False):
        loss = task.loss(task.forward(model, batch), batch) / task.weight(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval(), tokenizer


def main() -> None:
    """Reads the rows, trains and saves."""
    parser = argparse.ArgumentParser(description="A small Llama whose tokens are items, trained on rows of them.")
    parser.add_argument("rows", type=Path, help="JSON Lines with the column items")
    parser.add_argument("output", type=Path, help="the folder to write")
    for name, value, text in (
        ("steps", 100, "of training"),
        ("hidden", 64, "size of an item's vector, a multiple of 8"),
        ("layers", 2, "blocks"),
        ("context", 64, "items that the model sees"),
        ("minimum", 3, "how often an item must occur"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} ({value})")
    asked = parser.parse_args()
    rows = [json.loads(line) for line in asked.rows.read_text(encoding="utf-8").split("\n") if line.strip()]
    model, tokenizer = item_model(
        rows, steps=asked.steps, hidden=asked.hidden, layers=asked.layers, context=asked.context, minimum=asked.minimum
    )
    model.save_pretrained(asked.output)
    tokenizer.save_pretrained(asked.output)
    print(f"{len(tokenizer) - len(SPECIAL)} items, {sum(p.numel() for p in model.parameters())} parameters")


if __name__ == "__main__":
    main()
