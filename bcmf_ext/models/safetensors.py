"""The format safetensors: the length of a header, the header (JSON: dtype, shape, begin and end of each tensor), bytes.

Nothing in the header is believed: memory is taken only for bytes that are there.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import Damaged, briefly

_DTYPES = {  # The format has smaller dtypes, too.
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LONGEST_HEADER = 100_000_000  # The format allows so many bytes.


def is_safetensors(head: bytes) -> bool:
    """Whether a file begins with a number below 2**40 and a brace."""
    return head[5:9] == b"\0\0\0{"


def read_safetensors(file: IO[bytes], path: Path) -> dict[str, Tensor]:
    """The tensors by name. Raises `Damaged` if the file is."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, _LONGEST_HEADER):
        raise _damaged(path, f"its header of {length} bytes does not fit in it")
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    except Exception as error:  # JSON of another kind, or none, raises many types.
        raise _damaged(path, "its header is no list of tensors") from error
    tensors, position = {}, 8 + length
    for name, entry in entries:  # Each follows the one before, so that no two share bytes and none are left.
        if (nbytes := _nbytes(entry)) is None:
            raise _damaged(path, f"its header says {briefly(entry)} of {briefly(name)}")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        if begin != position or end != begin + nbytes or end > size:
            raise _damaged(path, f"{briefly(name)} is not where its header says")
        tensors[name] = _tensor(file.read(nbytes), entry)
        position = end
    if position != size:
        raise _damaged(path, f"its header speaks of {position} bytes, but it has {size}")
    return tensors


def _damaged(path: Path, what: str) -> Damaged:
    return Damaged(f"{path} is damaged, {what}: the download or the writing was broken off, get the file again.")


def _nbytes(entry: dict[str, Any]) -> int | None:
    """How many bytes a tensor takes; None if its entry in the header is none of a tensor."""
    shape = entry.get("shape")
    if (
        entry.get("dtype") not in _DTYPES
        or not isinstance(shape, list)
        or len(shape) > 16
        or not all(type(length) is int and 0 <= length < 2**31 for length in shape)
    ):
        return None
    return math.prod(shape) * _DTYPES[entry["dtype"]].itemsize


def _tensor(values: bytes, entry: dict[str, Any]) -> Tensor:
    if not values:
        return torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]])
    return torch.frombuffer(bytearray(values), dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])
