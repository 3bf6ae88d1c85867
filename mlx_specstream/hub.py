"""A model's folder: a local one, or the copy that the hub's client keeps of a repository; and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .errors import BadArgument, BadCheckpoint, SpecStreamError


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


def check_upload(repo: str) -> None:
    """Raise BadArgument, before any work, when an upload to this repository cannot succeed."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise BadArgument(f"[upload] {repo!r} is no repository id (owner/name): {error}") from None
    if get_token() is None:
        raise BadArgument("[upload] the hub does not know you; log in with hf auth login.")


def upload(folder: Path, repo: str) -> str:
    """Put a folder into a repository of the hub, made if need be, in one commit.

    Returns: the address of the repository.

    Raises:
        SpecStreamError: the hub does not take it; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Upload by mlx-specstream"
        )
    except Exception as error:  # network, authorisation, quota ...
        line = " ".join(str(error).split()) or type(error).__name__
        raise SpecStreamError(
            f"[upload] {folder} is complete but {repo} on the hub did not take it: {line[:300]}; "
            f"try again with: hf upload {repo} {folder}"
        ) from None
    return str(address)
