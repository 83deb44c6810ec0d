"""What goes through a task: rows, examples and batches. It needs nothing else, so that the loop can be used alone."""

from typing import Any

Row = dict[str, Any]
Example = dict[str, Any]
Batch = dict[str, Any]

IGNORED = -100
"""Label of a position that carries no loss, as torch's cross entropy has it."""

SEGMENTS = "segments"
"""Key of a batch of packed rows: the length of each example, in the order of the tokens; a list of int."""
