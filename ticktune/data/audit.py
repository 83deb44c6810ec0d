"""Rows -> counts of what is odd about them: rows that stand twice, answers that differ, control tokens."""

import hashlib
import re
from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ticktune.data.read import Rows
from ticktune.registry import TaskRow

Counts = dict[str, int]


def audit(rows: dict[str, Rows], task: TaskRow, control: re.Pattern[str] | None = None) -> dict[str, Counts]:
    """Counts what is odd about the rows of each split.

    16 bytes a row are held while it runs. Of files the names count.

    Args:
        rows: Split -> rows; train among them.
        task: The task's row in the registry.
        control: Finds a text that a tokenizer reads as one of its control tokens; None: there is no such text.

    Returns:
        For each split, ``repeated``: rows that stood there before; ``contradicted``: rows whose text, picture or sound
        stands there with another label too; ``control``: rows with a control token in their text; and, but for train,
        ``training``: rows that are training rows too.
    """
    found: dict[str, Counts] = {}
    training: NDArray[np.uint64] | None = None
    for name in sorted(rows, key=lambda name: name != "train"):
        whole, inputs, controls = _digests(rows[name], task, control)
        distinct, first = np.unique(whole, return_index=True)
        questions, answers = np.unique(inputs[first], return_counts=True)
        found[name] = {
            "repeated": len(whole) - len(distinct),
            "contradicted": int(np.isin(inputs, questions[answers > 1]).sum()),
            "control": controls,
        }
        if training is None:
            training = distinct
        else:
            found[name]["training"] = int(np.isin(whole, training).sum())
    return found


def _digests(
    rows: Rows, task: TaskRow, control: re.Pattern[str] | None
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], int]:
    """Digests of rows and of what they ask, both uint64 (rows,), and the number of rows with control tokens."""
    # Where the answer is text, two of them may both be right.
    labels = task.label_columns & {"label"}
    whole, inputs, controls = array("Q"), array("Q"), 0
    for row in rows.records():
        whole.append(_digest(row))
        inputs.append(_digest({k: v for k, v in row.items() if k not in labels}) if labels else whole[-1])
        controls += control is not None and any(map(control.search, _texts(row, task)))
    return np.frombuffer(whole, np.uint64), np.frombuffer(inputs, np.uint64), controls


def _texts(row: dict[str, Any], task: TaskRow) -> list[str]:
    texts = [row[column] for column in task.text_columns & row.keys()]
    return texts + [str(message["content"]) for message in row.get("messages", ())]


def _digest(row: dict[str, Any]) -> int:
    return int.from_bytes(hashlib.blake2b(repr(row).encode(), digest_size=8).digest(), "big")
