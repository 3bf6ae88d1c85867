"""The weight files of a Hugging Face folder: which they are, and whether they are whole."""

import json
import math
import re
import struct
from pathlib import Path

from mlx_specstream.errors import BadCheckpoint

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format itself
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)$")


def read_json(path: Path) -> dict:
    """A JSON object. Raises: BadCheckpoint when it cannot be read or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{path}: must hold a JSON object but holds a {type(value).__name__}")
    return value


def find_weights(folder: Path) -> list[Path]:
    """The files that hold the weights, safetensors before `.bin`, an index before a name pattern.

    Raises: BadCheckpoint when there are none, when a shard is missing, or when an index names a
    file outside the folder.
    """
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            return indexed(folder, index, suffix)
        files = sorted(p for p in folder.glob(f"{stem}*{suffix}") if p.is_file())
        if files:
            require_files(folder, expected_shards(files))
            return files
    raise BadCheckpoint(f"{folder}: no weights; expected model*.safetensors or pytorch_model*.bin")


def indexed(folder: Path, index: Path, suffix: str) -> list[Path]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise BadCheckpoint(f"{index}: 'weight_map' must map tensor names to files")
    names = set()
    for name in table.values():
        # A plain file name, nothing else: an index must not reach outside its folder.
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or "\0" in name:
            raise BadCheckpoint(
                f"{index}: 'weight_map' must name files of the same folder but names {name!r}"
            )
        if not name.endswith(suffix):
            raise BadCheckpoint(
                f"{index}: 'weight_map' must name {suffix} files but names {name!r}"
            )
        names.add(name)
    require_files(folder, names)
    return [folder / name for name in sorted(names)]


def expected_shards(files: list[Path]) -> set[str]:
    """Names of all shards that `model-00002-of-00003.safetensors` and its like announce."""
    expected = set()
    for match in filter(None, (SHARD.match(path.name) for path in files)):
        stem, _, total, suffix = match.groups()
        expected |= {f"{stem}-{i + 1:05d}-of-{total}{suffix}" for i in range(min(int(total), 9999))}
    return expected


def require_files(folder: Path, names: set[str]) -> None:
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise BadCheckpoint(f"{folder}: missing weight files: {some(missing)}; download them again")


def some(names, limit: int = 3) -> str:
    """A few names in one line, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def check_safetensors(path: Path) -> set[str]:
    """Check a safetensors header against its file and return the tensor names.

    Raises: BadCheckpoint when the file is truncated, when a tensor's bytes do not fit its shape or
    lie outside the file, or when two tensors overlap.
    """
    size = path.stat().st_size
    with open(path, "rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise BadCheckpoint(
                f"{path}: truncated or not safetensors: {size} bytes, header of {length} announced"
            )
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise BadCheckpoint(f"{path}: unreadable safetensors header ({error})") from None
    if not isinstance(header, dict):
        raise BadCheckpoint(f"{path}: the safetensors header must be a JSON object")
    header.pop("__metadata__", None)
    spans = sorted(span(path, name, entry) for name, entry in header.items())
    at = 0
    for start, stop, name in spans:
        if start < at:
            raise BadCheckpoint(f"{path}: tensor {name!r} overlaps another one")
        at = max(at, stop)
    if 8 + length + at > size:
        raise BadCheckpoint(
            f"{path}: truncated: {8 + length + at} bytes are needed but the file has {size}; "
            "download it again"
        )
    return set(header)


def span(path: Path, name: str, entry) -> tuple[int, int, str]:
    """First and last byte of one header entry, behind the header."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]}:
            sizes = [start, stop, *shape]
            whole = all(type(n) is int and n >= 0 for n in sizes)
            if whole and dtype not in ITEM_BYTES:
                raise BadCheckpoint(f"{path}: tensor {name!r} has unsupported type {dtype!r}")
            if whole and stop - start == math.prod(shape) * ITEM_BYTES[dtype]:
                return start, stop, name
    raise BadCheckpoint(f"{path}: tensor {name!r} has a damaged header entry")


def check_unique(names_of: dict[Path, set[str]]) -> None:
    """Raise BadCheckpoint when two files hold the same tensor: which one counts is unknowable."""
    owner = {}
    for path, names in names_of.items():
        for name in names:
            if name in owner:
                raise BadCheckpoint(
                    f"{path}: tensor {name!r} is also in {owner[name].name}; remove stale weight "
                    "files from the folder"
                )
            owner[name] = path
