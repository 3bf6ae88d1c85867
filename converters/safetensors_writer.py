"""Writing safetensors tensor by tensor: memory holds one tensor, whatever the file holds.

`mx.save_safetensors` computes every tensor of the file before it writes the first, and does not
say when a disk is full. Here each lazy array is computed, written and let go.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

ALIGNMENT = 8  # bytes; readers that map the file like it
DTYPES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.int8: "I8",
    mx.uint16: "U16",
    mx.int16: "I16",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.float32: "F32",
    mx.uint64: "U64",
    mx.int64: "I64",
    mx.float64: "F64",
    mx.complex64: "C64",
}


def write_safetensors(
    path: Path,
    tensors: dict[str, mx.array],
    metadata: dict[str, str] | None = None,
    wrote: Callable[[int], None] = lambda size: None,
) -> None:
    """Write lazy arrays to a file and empty `tensors` on the way.

    The bytes go to `path` itself: the caller owns a folder that vanishes when something fails.

    Args:
        wrote: told the size in bytes of each tensor after it was written.

    Raises: OSError (a full disk among them).
    """
    with open(path, "wb") as file:
        file.write(header(tensors, metadata))
        for name in list(tensors):
            array = tensors.pop(name)
            file.write(raw(array))
            wrote(array.nbytes)
            del array
            mx.clear_cache()  # Metal keeps the memory of arrays that are gone


def write_hollow(
    path: Path, tensors: dict[str, mx.array], metadata: dict[str, str] | None = None
) -> None:
    """A file of the right header and size without the bytes: they read as zeros, nothing is computed."""
    text = header(tensors, metadata)
    with open(path, "wb") as file:
        file.write(text)
        file.truncate(len(text) + sum(array.nbytes for array in tensors.values()))


def header(tensors: dict[str, mx.array], metadata: dict[str, str] | None) -> bytes:
    table, at = {"__metadata__": metadata} if metadata else {}, 0
    for name, array in tensors.items():
        table[name] = {
            "dtype": DTYPES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at := at + array.nbytes],
        }
    text = json.dumps(table, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def raw(array: mx.array) -> memoryview:
    """The bytes of an array in row-major order."""
    return memoryview(mx.contiguous(array.reshape(-1)).view(mx.uint8))
