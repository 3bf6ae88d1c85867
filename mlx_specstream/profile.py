"""Profiles: what ``mlx-specstream tune`` measured, one small JSON file per machine and model.

A profile is only ever a help. Reading one never raises: a file that is missing, damaged or of
somebody else counts as none. A leaf: imports nothing of ours but errors.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from .errors import BadArgument

FORMAT_VERSION = 1
FOLDER = "MLX_SPECSTREAM_CACHE"  # environment variable: the folder itself
LARGEST = 1 << 20  # bytes of a file that is read; a profile has a few thousand

Plain = str | int | float | bool | None
T = TypeVar("T")


def cache_folder() -> Path:
    """Where profiles lie: $MLX_SPECSTREAM_CACHE, or a folder of ours in the user's cache.

    Raises:
        BadArgument: the user has no home folder.
    """
    if given := os.environ.get(FOLDER):
        return Path(given).expanduser()
    try:
        if sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or "")
            if not base.is_absolute():  # the XDG rule: a relative one is ignored
                base = Path.home() / ".cache"
    except RuntimeError:
        raise BadArgument(f"[profile] there is no home folder; set {FOLDER} to one.") from None
    return base / "mlx-specstream" / "profiles"


def profile_key(
    *,
    machine: str,
    model: str,
    quantization: str,
    dtype: str,
    streams: Mapping[str, Plain] | None,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """What a profile holds for. Any difference makes another profile.

    Args:
        machine: chip, device and cores: whatever changes the speed.
        model: its architecture and sizes; two fine-tunes of a base are as fast as it is.
        quantization: bits, group size and mode, or "none".
        dtype: of the activations.
        streams: their geometry, or None without streams.
        versions: of the libraries whose kernels are timed.
    """
    return {
        "machine": machine,
        "model": model,
        "quantization": quantization,
        "dtype": dtype,
        "streams": None if streams is None else dict(streams),
        "versions": dict(versions),
    }


def profile_path(key: Mapping[str, Any], folder: str | Path | None = None) -> Path:
    """The file of a key: a short hash of it, in ``folder`` (default: ``cache_folder()``)."""
    text = json.dumps(key, sort_keys=True, separators=(",", ":"))
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    return (cache_folder() if folder is None else Path(folder)) / f"{name}.json"


def save_profile(
    key: Mapping[str, Any], profile: Mapping[str, Any], folder: str | Path | None = None
) -> Path:
    """Write a profile. It appears whole or not at all.

    Args:
        key: of ``profile_key``.
        profile: anything JSON can hold; the costs of ``decode/costs.py``, when they were measured ...

    Returns:
        The file.

    Raises:
        BadArgument: the folder cannot be written, or a value is no JSON (NaN is none).
    """
    path, temporary = profile_path(key, folder), None
    try:
        data = {"format_version": FORMAT_VERSION, "key": key, "profile": profile}
        text = json.dumps(data, indent=1, allow_nan=False) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".profile-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except (TypeError, ValueError) as error:
        raise BadArgument(f"[profile] must be plain JSON values: {error}.") from None
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        why = error.strerror or str(error)
        raise BadArgument(
            f"[profile] {path} cannot be written ({why}); set {FOLDER} to a folder that can."
        ) from None
    return path


def load_profile(
    key: Mapping[str, Any],
    parse: Callable[[dict[str, Any]], T] = dict,
    folder: str | Path | None = None,
) -> T | None:
    """The profile of a key, or None; never raises.

    Args:
        parse: makes something of the stored profile; an exception of it means a damaged file.
    """
    try:
        path = profile_path(key, folder)
        with open(path, "rb") as file:
            data = json.loads(file.read(LARGEST))  # the beginning of a larger one is no JSON
        if data["format_version"] != FORMAT_VERSION or data["key"] != json.loads(json.dumps(key)):
            return None
        return parse(data["profile"])
    except Exception:  # whatever is wrong with it, the user only wants to generate
        return None
