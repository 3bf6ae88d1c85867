"""A model's folder: a local one as it is, or the copy that the hub's client keeps of a repository."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .errors import BadCheckpoint


def resolve(path_or_hf_repo: str | Path, download: Callable[[str], str | Path]) -> Path:
    """The folder behind a path or a hub id.

    Args:
        download: brings a repository and returns its folder; whatever it raises becomes one line.

    Raises:
        BadCheckpoint: no such folder, or the hub does not give it.
    """
    folder, name = Path(path_or_hf_repo).expanduser(), str(path_or_hf_repo)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise BadCheckpoint(f"[load] {folder} is not a folder; a model is a folder.")
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise BadCheckpoint(
            f"[load] {folder} does not exist; give a model folder or a hub id (owner/name)."
        )
    try:
        return Path(download(name))
    except Exception as error:  # network, authorisation, no such repository, offline ...
        line = " ".join(str(error).split()) or type(error).__name__
        raise BadCheckpoint(
            f"[load] {name} is neither a local folder nor downloadable: {line[:300]}"
        ) from None
