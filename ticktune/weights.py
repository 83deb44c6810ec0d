"""Safetensors files, looked at before the library reads them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ticktune.errors import CheckpointError, first_line

if TYPE_CHECKING:
    from torch import Tensor

_MAX_HEADER = 32 << 20  # bytes, some 300,000 tensors; a file of a large model has thousands
# Bytes of one value of a safetensors dtype; of any other the library judges.
_DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


def weights_header(path: Path) -> dict[str, Any]:
    """Returns the header of a safetensors file: name -> dtype, shape and data_offsets.

    The library takes the last of two tensors with one name, and says little of what is wrong; so this looks first.

    Raises:
        ValueError: The file is cut, too long or damaged, a name stands twice, or tensors overlap or leave a hole.
        OSError: It cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > size - 8:
            raise ValueError("the header is longer than the file")
        if length > _MAX_HEADER:
            raise ValueError(f"the header is longer than {_MAX_HEADER >> 20} MiB")
        try:
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
        except RecursionError:
            raise ValueError("the header is nested too deep") from None
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the metadata are not text")
    spans = sorted(_span(name, entry) for name, entry in header.items() if name != "__metadata__")
    position = 0
    for begin, end, name in spans:
        if begin != position:
            raise ValueError(f"the tensor {name[:100]!r} does not begin where the one before it ends")
        position = end
    if 8 + length + position != size:
        raise ValueError("the file is not as long as its header says")
    return header


def load_weights(path: Path) -> dict[str, Any]:
    """Reads a safetensors file of ours.

    Raises:
        CheckpointError: It is missing or damaged, or names a tensor twice.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights_header(path)
        tensors: dict[str, Any] = load_file(path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"the file is damaged: {first_line(error)}", where=str(path)) from error
    return tensors


def tensor_bytes(tensors: "Mapping[str, Tensor]") -> int:
    """Returns how many bytes the values of some tensors take in a file."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _span(name: str, entry: Any) -> tuple[int, int, str]:
    """Where a tensor's bytes begin and end."""
    if not name.isprintable() or name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"{name[:100]!r} is no name of a tensor")
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"the entry of the tensor {name[:100]!r} is damaged")
    begin, end = offsets
    width = _DTYPE_BYTES.get(dtype)
    if begin > end or (width is not None and math.prod(shape) * width != end - begin):
        raise ValueError(f"the tensor {name[:100]!r} has not as many bytes as its shape")
    return begin, end, name


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in the header")
    return found
