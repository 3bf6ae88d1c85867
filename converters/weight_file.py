"""One file of weights, safetensors or PyTorch's: what lies in it, and the tensors themselves."""

from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_specstream.errors import BadCheckpoint

from .accounting import Tensor
from .safetensors_header import check_safetensors, read_header
from .safetensors_writer import DTYPES
from .torch_pickle import describe_torch, load_one, load_torch, read_state

SAFETENSORS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# One set of names for types, whatever the format calls them.
NAMES = {code: str(kind).removeprefix("mlx.core.") for kind, code in DTYPES.items()}


class Contents(NamedTuple):
    """What lies in a file; no tensor was read to know it.

    Args:
        kind: "safetensors" or "pickled".
        tensors: by name.
        values: plain values beside them (the metadata of safetensors).
        ignored: what else lies there.
        unused: bytes that belong to no tensor.
    """

    kind: str
    tensors: dict[str, Tensor]
    values: dict[str, Any]
    ignored: list[str]
    unused: int = 0


def is_weights(path: Path) -> bool:
    """Whether a file is called like one that is read here."""
    return path.suffix in (*PICKLES, SAFETENSORS)


def look_into(path: Path) -> Contents:
    """Read what a file says about itself. Raises: BadCheckpoint for damage, or for another format."""
    if is_pickled(path):
        state = read_state(path)
        tensors = {
            n: Tensor(n, t.shape, t.storage.dtype.strip("_")) for n, t in state.tensors.items()
        }
        return Contents("pickled", tensors, state.values, state.ignored)
    header = read_header(path)
    tensors = {
        name: Tensor(name, entry.shape, NAMES.get(entry.dtype, entry.dtype))
        for name, entry in header.tensors.items()
    }
    return Contents("safetensors", tensors, header.metadata, [], header.unused)


def is_pickled(path: Path) -> bool:
    """By its name, or where that says nothing by how it begins."""
    if is_weights(path):
        return path.suffix in PICKLES
    with open(path, "rb") as stream:
        begin = stream.read(9)
    if begin[:4] == b"PK\x03\x04":
        return True
    if begin[8:9] == b"{":
        return False
    raise BadCheckpoint(f"{path}: neither safetensors nor a PyTorch file")


def read_tensors(path: Path, hollow: bool = False) -> dict[str, mx.array]:
    """The tensors of a file, lazy where it is safetensors; hollow ones have shape and dtype alone."""
    if is_pickled(path):
        return describe_torch(path) if hollow else load_torch(path)
    check_safetensors(path)
    return mx.load(str(path))


def read_tensor(path: Path, name: str) -> mx.array:
    """One tensor of a file that has it."""
    return load_one(path, name) if is_pickled(path) else read_tensors(path)[name]
