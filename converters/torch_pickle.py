"""PyTorch `.bin` files without PyTorch: an allow-listed pickle reader that never runs code.

Two layouts exist. Since PyTorch 1.6 a file is a zip archive: `NAME/data.pkl` describes the tensors
and `NAME/data/KEY` holds the raw bytes of each storage. Before that it is a row of pickles with the
storages behind them. In both a tensor is (storage, offset, shape, stride) and the bytes are plain
little-endian numbers, so reading needs a pickle interpreter that knows few names.
"""

import contextlib
import io
import math
import mmap
import os
import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_specstream.errors import BadCheckpoint

from .inert import STAND_INS
from .nested import State, find_state
from .pickle_reader import MAX_BYTES, plain_key, read_pickle
from .plausible import check_names

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file written before PyTorch 1.6
MAX_DIRECTORY = 16 << 20  # bytes of a zip archive's table of contents; an entry takes about 80
MAX_DIMS = 16
MAX_SHARING = 8  # tensors may share storages (tied heads do), but not claim the whole disk

# storage class of PyTorch -> (name of the MLX dtype, numpy dtype that holds the bits)
STORAGES = {
    "FloatStorage": ("float32", "f4"),
    "DoubleStorage": ("float64", "f8"),
    "HalfStorage": ("float16", "f2"),
    "BFloat16Storage": ("bfloat16", "u2"),
    "LongStorage": ("int64", "i8"),
    "IntStorage": ("int32", "i4"),
    "ShortStorage": ("int16", "i2"),
    "CharStorage": ("int8", "i1"),
    "ByteStorage": ("uint8", "u1"),
    "BoolStorage": ("bool_", "u1"),
}
NARROWED = {"float64": "float32"}  # MLX computes in no more


class StorageType(NamedTuple):
    """Stands for `torch.FloatStorage` and its sisters. A tuple: a pickle cannot change it."""

    dtype: str
    bits: str


class Storage(NamedTuple):
    dtype: str
    bits: str
    key: str
    numel: int


class TensorView(NamedTuple):
    """A tensor as the pickle describes it, checked against its storage."""

    storage: Storage
    offset: int
    shape: tuple
    stride: tuple


class StateDict(dict):
    """Stands for `collections.OrderedDict`; what a pickle sets as its attributes is dropped."""

    def __init__(self, pairs=()):
        super().__init__((plain_key(key), value) for key, value in pairs)

    def __setstate__(self, state):
        pass


class Rebuild:
    """Stands for `torch._utils._rebuild_tensor_v2` and `_rebuild_parameter`."""

    __slots__ = ()

    def __call__(self, first, *rest):
        if isinstance(first, TensorView):  # a parameter wraps a tensor that is already rebuilt
            return first
        if not isinstance(first, Storage) or len(rest) < 3:
            raise BadCheckpoint("a tensor in the pickle has no storage")
        return view(first, *rest[:3])


def torch_size(dims=()) -> tuple:
    """Stands for `torch.Size`."""
    if len(dims) > MAX_DIMS:
        raise BadCheckpoint(f"a tensor of {len(dims)} dimensions")
    return tuple(dims)


def filled_later(*factory) -> StateDict:
    """Stands for `collections.defaultdict`."""
    return StateDict()


REBUILD = Rebuild()
ALLOWED = {
    **STAND_INS,
    ("collections", "defaultdict"): filled_later,
    ("collections", "OrderedDict"): StateDict,
    ("torch._utils", "_rebuild_tensor"): REBUILD,
    ("torch._utils", "_rebuild_tensor_v2"): REBUILD,
    ("torch._utils", "_rebuild_parameter"): REBUILD,
    ("torch._utils", "_rebuild_parameter_with_state"): REBUILD,
    ("torch", "Size"): torch_size,
    **{("torch", name): StorageType(*types) for name, types in STORAGES.items()},
}


def is_size(value) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def view(storage: Storage, offset, shape, stride) -> TensorView:
    """Check that a strided tensor lies inside its storage.

    Raises: BadCheckpoint when a number is negative, when the last element lies behind the end, or
    when the tensor has more elements than its storage (a few bytes could claim any memory).
    """
    if not (isinstance(shape, (tuple, list)) and isinstance(stride, (tuple, list))):
        raise BadCheckpoint("a tensor's shape and stride must be tuples")
    if len(shape) != len(stride) or len(shape) > MAX_DIMS:
        raise BadCheckpoint(
            f"a tensor of {len(shape)} dimensions cannot have stride of {len(stride)}; at most "
            f"{MAX_DIMS} are read"
        )
    if not all(map(is_size, (offset, *shape, *stride))):
        raise BadCheckpoint("a tensor has a negative or huge offset, shape or stride")
    shape, stride = tuple(shape), tuple(stride)
    count = math.prod(shape)
    extent = sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1 if count else 0
    if offset + extent > storage.numel or count > storage.numel:
        raise BadCheckpoint(
            f"a tensor of shape {shape}, stride {stride} at offset {offset} leaves its storage of "
            f"{storage.numel} elements"
        )
    return TensorView(storage, offset, shape, stride)


def storage_of(pid) -> Storage:
    """The storage that a persistent id of the pickle names."""
    match pid:
        case ("storage", StorageType(dtype, bits), str(key), str(), numel, *rest) if is_size(numel):
            if any(part is not None for part in rest):  # views of views, before PyTorch 0.4
                raise BadCheckpoint("storage views of PyTorch < 0.4 are not supported")
            return Storage(dtype, bits, key, numel)
    raise BadCheckpoint("unreadable storage in the pickle")


def unpickle(stream):
    """Read one pickle from a binary file object and leave the position behind it."""
    return read_pickle(stream, ALLOWED, storage_of)


class CarefulFile(io.FileIO):
    """A file for `zipfile`, which reads the whole table of contents before anyone can look."""

    def read(self, size=-1):
        if size > MAX_DIRECTORY:
            raise BadCheckpoint(f"the archive's table of contents claims {size} bytes")
        return super().read(size)


class ZipStorages:
    """Storages of a zip-format file, by key, as read-only numpy arrays over the mapped file."""

    def __init__(self, archive: zipfile.ZipFile, data: mmap.mmap):
        self.data = data
        self.entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [n for n in self.entries if n == "data.pkl" or n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise BadCheckpoint(f"expected one data.pkl in the archive but found {len(pickles)}")
        self.prefix = pickles[0][: -len("data.pkl")]
        self.pickle = bytes(self.read("data.pkl")[:MAX_BYTES])
        named = self.prefix + "byteorder" in self.entries
        order = bytes(self.read("byteorder")[:16]) if named else b""
        if order not in (b"", b"little", b"big"):
            raise BadCheckpoint(f"unknown byte order {order!r}")
        self.order = ">" if order == b"big" else "<"

    def read(self, name: str) -> memoryview:
        entry = self.entries.get(self.prefix + name)
        if entry is None:
            raise BadCheckpoint(f"the archive has no entry {name!r}: the file is incomplete")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise BadCheckpoint(f"archive entry {name!r} is compressed; PyTorch never does that")
        # The local header repeats the name and has its own extra field, which pads to 64 bytes.
        header = self.data[entry.header_offset : entry.header_offset + 30]
        if entry.header_offset < 0 or len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise BadCheckpoint(f"archive entry {name!r} has no header: the file is damaged")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + entry.file_size > len(self.data):
            raise BadCheckpoint(f"archive entry {name!r} ends behind the end of the file")
        return memoryview(self.data)[start : start + entry.file_size]

    def array(self, storage: Storage) -> np.ndarray:
        raw = self.read(f"data/{storage.key}")
        bits = np.dtype(self.order + storage.bits)
        if raw.nbytes != storage.numel * bits.itemsize:
            raise BadCheckpoint(
                f"storage {storage.key!r} must have {storage.numel * bits.itemsize} bytes but has "
                f"{raw.nbytes}"
            )
        return np.frombuffer(raw, bits)


class LegacyStorages:
    """Storages of a file written before PyTorch 1.6: sizes and bytes behind the pickles."""

    def __init__(self, stream, data: mmap.mmap):
        self.data, self.order = data, "<"
        if unpickle(stream) != LEGACY_MAGIC:
            raise BadCheckpoint("not a PyTorch checkpoint: neither a zip archive nor its old form")
        unpickle(stream)  # protocol version
        info = unpickle(stream)
        if isinstance(info, dict) and info.get("little_endian") is False:
            self.order = ">"
        self.state = unpickle(stream)
        keys = unpickle(stream)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise BadCheckpoint("the list of storages is damaged")
        self.owners = {tensor.storage.key: tensor.storage for tensor in tensors_in(self.state)}
        self.starts, at = {}, stream.tell()
        for key in keys:
            if key not in self.owners:
                raise BadCheckpoint(f"storage {key!r} belongs to no tensor")
            numel, itemsize = self.owners[key].numel, np.dtype(self.owners[key].bits).itemsize
            written = data[at : at + 8]
            if len(written) < 8 or struct.unpack(self.order + "q", written)[0] != numel:
                raise BadCheckpoint(f"storage {key!r} is damaged or the file is truncated")
            self.starts[key] = at + 8
            at += 8 + numel * itemsize
        if at > len(data):
            raise BadCheckpoint(f"truncated: {at} bytes are needed but the file has {len(data)}")

    def array(self, storage: Storage) -> np.ndarray:
        if storage.key not in self.starts:
            raise BadCheckpoint(f"storage {storage.key!r} is missing")
        if self.owners[storage.key] != storage:  # two tensors may share one, not reinterpret it
            raise BadCheckpoint(f"storage {storage.key!r} is described in two ways")
        bits = np.dtype(self.order + storage.bits)
        return np.frombuffer(self.data, bits, storage.numel, self.starts[storage.key])


def is_tensor(value) -> bool:
    return isinstance(value, TensorView)


def tensors_in(tree) -> list[TensorView]:
    """All tensors in what a pickle holds, an optimizer's among them (its nesting is limited)."""
    waiting, found = [tree], []
    while waiting:
        value = waiting.pop()
        if is_tensor(value):
            found.append(value)
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return found


def to_mlx(values: np.ndarray, tensor: TensorView) -> mx.array:
    """One tensor out of its storage; strides are resolved here, float64 becomes float32."""
    steps = [step * values.itemsize for step in tensor.stride]
    values = np.lib.stride_tricks.as_strided(
        values[tensor.offset :], tensor.shape, steps, writeable=False
    )
    dtype = tensor.storage.dtype
    native = "f4" if dtype in NARROWED else values.dtype.newbyteorder("=")
    # A copy: MLX wants aligned rows, and the mapped file is closed afterwards.
    array = mx.array(np.array(values, dtype=native, order="C"))
    if dtype == "bfloat16":
        return array.view(mx.bfloat16)
    return array.astype(mx.bool_) if dtype == "bool_" else array


@contextlib.contextmanager
def open_torch(path: Path):
    """The state dict of a `.bin` file, tensors as descriptions, and the storages that hold them.

    No code of the file runs and no name in it is a path. Raises: BadCheckpoint, with the file's
    name, for anything but a dict of plain tensors, bare or under a usual name.
    """
    try:
        with open(path, "rb") as stream:
            if (length := os.fstat(stream.fileno()).st_size) == 0:
                raise BadCheckpoint("the file is empty")
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            if data[:4] == b"PK\x03\x04":
                with CarefulFile(path) as careful, zipfile.ZipFile(careful) as archive:
                    storages = ZipStorages(archive, data)
                state = unpickle(io.BytesIO(storages.pickle))
            else:
                storages = LegacyStorages(stream, data)
                state = storages.state
            found = find_state(state, is_tensor)
            check_names(found.tensors)
            check_amount(found.tensors, length)
            yield found, storages
    except (zipfile.BadZipFile, struct.error, NotImplementedError, ValueError) as error:
        raise BadCheckpoint(f"{path}: truncated or damaged archive ({error})") from None
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{path}: {error}") from None


def check_amount(state: dict[str, TensorView], length: int) -> None:
    """Raise BadCheckpoint where few bytes claim to be many tensors."""
    claimed = sum(math.prod(t.shape) * np.dtype(t.storage.bits).itemsize for t in state.values())
    if claimed > MAX_SHARING * length:
        raise BadCheckpoint(f"tensors of {claimed} bytes in a file of {length}")


def load_torch(path: Path) -> dict[str, mx.array]:
    """Tensors of a `.bin` file by name. Raises: as `open_torch`."""
    with open_torch(path) as (state, storages):
        tensors = {}
        for name, tensor in state.tensors.items():
            tensors[name] = to_mlx(storages.array(tensor.storage), tensor)
            storages.data.madvise(mmap.MADV_DONTNEED)  # what was read need not stay in memory
        return tensors


def load_one(path: Path, name: str) -> mx.array:
    """One tensor of a `.bin` file that has it. Raises: as `open_torch`."""
    with open_torch(path) as (state, storages):
        tensor = state.tensors[name]
        return to_mlx(storages.array(tensor.storage), tensor)


def describe_torch(path: Path) -> dict[str, mx.array]:
    """As `load_torch`, but nothing is read: lazy zeros of the same shapes and dtypes."""
    with open_torch(path) as (state, _):
        return {
            name: mx.zeros(tensor.shape, getattr(mx, NARROWED.get(kind, kind)))
            for name, tensor in state.tensors.items()
            for kind in [tensor.storage.dtype]
        }


def read_state(path: Path) -> State:
    """What lies in a file, and what beside the state dict; tensors as descriptions."""
    with open_torch(path) as (state, _):
        return state
