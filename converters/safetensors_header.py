"""The header of a safetensors file: read, and held against the bytes that are really there.

    8 bytes         N, unsigned and little-endian
    N bytes         JSON: name -> {dtype, shape, data_offsets}, in UTF-8
    the rest        the tensors; offsets count from here

MLX trusts what it reads there, so everything is checked first, and read as MLX reads it.
"""

import json
import math
import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mlx_specstream.errors import BadCheckpoint

from .plausible import check_names

MAX_HEADER = 16 << 20  # bytes; 100,000 tensors take 13 MB
MAX_SHAPE = 1 << 31  # MLX counts in int32
MAX_DIMS = 16
METADATA = "__metadata__"
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


class Entry(NamedTuple):
    """One tensor: its dtype as the format spells it, its shape, its bytes behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    tensors: dict[str, Entry]
    metadata: dict
    unused: int  # bytes of the file that belong to no tensor


def read_header(path: Path) -> Header:
    """The checked header of a file. Raises: BadCheckpoint as `parse_header`, with the file's name."""
    try:
        with open(path, "rb") as stream:
            return parse_header(stream, os.fstat(stream.fileno()).st_size)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{path}: {error}") from None


def check_safetensors(path: Path) -> set[str]:
    """The tensor names of a file whose header and bytes agree. Raises: as `read_header`."""
    return set(read_header(path).tensors)


def parse_header(stream: BinaryIO, size: int) -> Header:
    """Read the header of a file of `size` bytes.

    Raises: BadCheckpoint when the file is truncated, when a name occurs twice, when a tensor's
    bytes do not fit its shape or lie outside the file, or when two tensors overlap.
    """
    prefix = stream.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= size - 8:
        raise BadCheckpoint(
            f"truncated or not safetensors: {size} bytes, header of {length} announced"
        )
    if length > MAX_HEADER:
        raise BadCheckpoint(f"header of {length} bytes; at most {MAX_HEADER} are read")
    try:
        # Strictly UTF-8: json would also take UTF-16, and MLX read something else then.
        table = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"unreadable safetensors header ({str(error)[:100]})") from None
    if not isinstance(table, dict):
        raise BadCheckpoint("the safetensors header must be a JSON object")
    metadata = table.pop(METADATA, None)
    metadata = {} if metadata is None else metadata  # as MLX writes none
    if not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise BadCheckpoint("the safetensors metadata must map names to text")
    check_names(table)
    tensors = {name: parse_entry(name, entry) for name, entry in table.items()}
    check_spans(tensors, 8 + length, size)
    used = sum(entry.stop - entry.start for entry in tensors.values())
    return Header(tensors, metadata, size - 8 - length - used)


def unique(pairs: list[tuple]) -> dict:
    """A JSON object whose keys occur once: readers differ in which of two they believe."""
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key occurs twice")
    texts = [*table, *(value for value in table.values() if isinstance(value, str))]
    "".join(texts).encode("utf-8")  # half a character, in an escape, is none for MLX
    return table


def parse_entry(name: str, entry) -> Entry:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, stop]}:
            whole = len(shape) <= MAX_DIMS and all(
                type(n) is int and 0 <= n < limit
                for n, limit in [
                    (start, 1 << 63),
                    (stop, 1 << 63),
                    *((n, MAX_SHAPE) for n in shape),
                ]
            )
            if whole and dtype not in ITEM_BYTES:
                raise BadCheckpoint(f"tensor {name!r} has unsupported type {dtype[:20]!r}")
            if whole and stop - start == math.prod(shape) * ITEM_BYTES[dtype]:
                return Entry(dtype, tuple(shape), start, stop)
    raise BadCheckpoint(f"tensor {name!r} has a damaged header entry")


def check_spans(tensors: dict[str, Entry], begin: int, size: int) -> None:
    at = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if entry.start < at:
            raise BadCheckpoint(f"tensor {name!r} overlaps another one")
        at = entry.stop
    if begin + at > size:
        raise BadCheckpoint(
            f"truncated: {begin + at} bytes are needed but the file has {size}; download it again"
        )
