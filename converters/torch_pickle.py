"""PyTorch `.bin` files without PyTorch: an allow-listed pickle reader that never runs code.

Two layouts exist. Since PyTorch 1.6 a file is a zip archive: `NAME/data.pkl` describes the tensors
and `NAME/data/KEY` holds the raw bytes of each storage. Before that it is a row of pickles with the
storages behind them. In both a tensor is (storage, offset, shape, stride) and the bytes are plain
little-endian numbers, so reading needs a pickle interpreter that knows about ten names.
"""

import io
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_specstream.errors import BadCheckpoint

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of a file written before PyTorch 1.6
MAX_PICKLE = 256 << 20  # bytes; the description of a 70B checkpoint's shard is below 1 MB
MAX_DIMS = 16

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
    "BoolStorage": ("bool", "u1"),
}


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


REBUILD = Rebuild()
ALLOWED = {
    ("collections", "OrderedDict"): StateDict,
    ("torch._utils", "_rebuild_tensor"): REBUILD,
    ("torch._utils", "_rebuild_tensor_v2"): REBUILD,
    ("torch._utils", "_rebuild_parameter"): REBUILD,
    ("torch", "Size"): tuple,
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
    shape, stride = tuple(shape), tuple(stride)
    if len(shape) != len(stride) or len(shape) > MAX_DIMS:
        raise BadCheckpoint(f"a tensor of shape {shape} cannot have stride {stride}")
    if not all(map(is_size, (offset, *shape, *stride))):
        raise BadCheckpoint(f"negative or huge tensor: offset {offset}, {shape}, stride {stride}")
    count = math.prod(shape)
    extent = sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1 if count else 0
    if offset + extent > storage.numel or count > storage.numel:
        raise BadCheckpoint(
            f"a tensor of shape {shape}, stride {stride} at offset {offset} leaves its storage of "
            f"{storage.numel} elements"
        )
    return TensorView(storage, offset, shape, stride)


class TensorUnpickler(pickle.Unpickler):
    """A pickle reader for tensors: any name outside `ALLOWED` is an error, nothing is imported."""

    def find_class(self, module, name):
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise BadCheckpoint(
                f"the pickle asks for {module}.{name}, which is not part of a plain checkpoint; "
                "it was not run. Use a checkpoint in safetensors"
            ) from None

    def persistent_load(self, pid):
        match pid:
            case ("storage", StorageType(dtype, bits), str(key), str(), numel, *rest) if is_size(
                numel
            ):
                if any(part is not None for part in rest):  # views of views, before PyTorch 0.4
                    raise BadCheckpoint("storage views of PyTorch < 0.4 are not supported")
                return Storage(dtype, bits, key, numel)
        raise BadCheckpoint(f"unreadable storage in the pickle: {str(pid)[:80]}")


def unpickle(stream):
    """Read one pickle from a binary file object and leave the position behind it."""
    start = stream.tell()
    try:
        for opcode, argument, position in pickletools.genops(stream):
            if (position or start) - start > MAX_PICKLE:
                raise BadCheckpoint(f"the pickle is longer than {MAX_PICKLE >> 20} MiB")
            # The C reader allocates its memo up to the index before it looks at anything else.
            if opcode.name in ("PUT", "LONG_BINPUT") and argument > MAX_PICKLE:
                raise BadCheckpoint(f"memo index {argument} in the pickle")
        stream.seek(start)
        return TensorUnpickler(stream, encoding="utf-8").load()
    except BadCheckpoint:
        raise
    except Exception as error:  # a damaged pickle fails in many ways, none of them ours
        raise BadCheckpoint(f"the pickle is damaged ({type(error).__name__}: {error})") from None


class ZipStorages:
    """Storages of a zip-format file, by key, as read-only numpy arrays over the mapped file."""

    def __init__(self, archive: zipfile.ZipFile, data: mmap.mmap):
        self.data = data
        self.entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [n for n in self.entries if n == "data.pkl" or n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise BadCheckpoint(f"expected one data.pkl in the archive but found {len(pickles)}")
        self.prefix = pickles[0][: -len("data.pkl")]
        self.pickle = bytes(self.read("data.pkl"))
        order = bytes(self.read("byteorder")) if self.prefix + "byteorder" in self.entries else b""
        if order not in (b"", b"little", b"big"):
            raise BadCheckpoint(f"unknown byte order {order[:16]!r}")
        self.order = ">" if order == b"big" else "<"

    def read(self, name: str) -> memoryview:
        entry = self.entries.get(self.prefix + name)
        if entry is None:
            raise BadCheckpoint(f"the archive has no entry {name!r}: the file is incomplete")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise BadCheckpoint(f"archive entry {name!r} is compressed; PyTorch never does that")
        # The local header repeats the name and has its own extra field, which pads to 64 bytes.
        header = self.data[entry.header_offset : entry.header_offset + 30]
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
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
        check_state(self.state)
        self.owners = {tensor.storage.key: tensor.storage for tensor in self.state.values()}
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


def check_state(state) -> None:
    """Raise BadCheckpoint unless the pickled object is a flat dict of name -> tensor."""
    if not isinstance(state, dict):
        raise BadCheckpoint(
            f"expected a dict of tensors but the pickle is a {type(state).__name__}"
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, TensorView):
            raise BadCheckpoint(
                f"entry {str(name)[:60]!r} is a {type(value).__name__}, not a tensor; save the "
                "model's state_dict"
            )


def to_mlx(values: np.ndarray, tensor: TensorView) -> mx.array:
    """One tensor out of its storage; strides are resolved here, float64 becomes float32."""
    steps = [step * values.itemsize for step in tensor.stride]
    values = np.lib.stride_tricks.as_strided(
        values[tensor.offset :], tensor.shape, steps, writeable=False
    )
    dtype = tensor.storage.dtype
    native = "f4" if dtype == "float64" else values.dtype.newbyteorder("=")
    # A copy: MLX wants aligned rows, and the mapped file is closed afterwards.
    array = mx.array(np.array(values, dtype=native, order="C"))
    if dtype == "bfloat16":
        return array.view(mx.bfloat16)
    return array.astype(mx.bool_) if dtype == "bool" else array


def load_torch(path: Path) -> dict[str, mx.array]:
    """Tensors of a `.bin` file by name. No code of the file runs and no name in it is a path.

    Raises: BadCheckpoint, with the file's name, for anything but a flat dict of plain tensors.
    """
    try:
        with open(path, "rb") as stream:
            if path.stat().st_size == 0:
                raise BadCheckpoint("the file is empty")
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            if data[:4] == b"PK\x03\x04":
                with zipfile.ZipFile(stream) as archive:
                    storages = ZipStorages(archive, data)
                    state = unpickle(io.BytesIO(storages.pickle))
            else:
                storages = LegacyStorages(stream, data)
                state = storages.state
            check_state(state)
            return {
                name: to_mlx(storages.array(tensor.storage), tensor)
                for name, tensor in state.items()
            }
    except (zipfile.BadZipFile, struct.error, NotImplementedError, ValueError) as error:
        raise BadCheckpoint(f"{path}: truncated or damaged archive ({error})") from None
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{path}: {error}") from None
