"""The weight files of a Hugging Face folder: which they are, and whether they are whole."""

import json
import re
from pathlib import Path

from mlx_specstream.errors import BadCheckpoint

MAX_JSON = 32 << 20  # bytes; the index of a model of 700B parameters has 10 MB
KINDS = (("model", ".safetensors"), ("pytorch_model", ".bin"))  # names of files, the best first
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.\w+)$")


def read_json(path: Path) -> dict:
    """A JSON object. Raises: BadCheckpoint when it cannot be read or is something else."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise BadCheckpoint(f"{path}: longer than {MAX_JSON} bytes")
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
    for stem, suffix in KINDS:
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            return indexed(folder, index, suffix)
        files = sorted(p for p in folder.glob(f"{stem}*{suffix}") if p.is_file())
        if files:
            require_files(folder, expected_shards(files))
            return files
    raise BadCheckpoint(
        f"{folder}: no weights; expected model*.safetensors or pytorch_model*.bin (for a state dict "
        "under another name give the file itself)"
    )


def has_weights(folder: Path) -> bool:
    """Whether there is anything that `find_weights` would look at."""
    return any(any(folder.glob(f"{stem}*{suffix}*")) for stem, suffix in KINDS)


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
