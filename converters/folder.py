"""Whether the files of a stranger's folder are files of that folder."""

import re
from pathlib import Path

from mlx_specstream.errors import BadCheckpoint

# Folders inside a model folder whose files are read, too.
INSIDE = ("additional_chat_templates", "streams")
# The hub's client keeps the files of a repository in `blobs` and links to them.
HUB_CACHE = re.compile(r"(?:models|datasets|spaces)--")


def check_folder(folder: Path) -> None:
    """Look at every file before any is opened.

    Raises: BadCheckpoint for a link that leaves the folder (a conversion would copy what it points
    to into its result), and for what is no file at all (opening a pipe waits forever).
    """
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots" and HUB_CACHE.match(root.parent.parent.name):
        allowed.append(root.parent.parent / "blobs")
    inside = [path for name in INSIDE for path in sorted((folder / name).glob("*"))]
    for path in (*sorted(folder.iterdir()), *inside):
        if path.is_dir() and path.name not in INSIDE:
            continue
        try:
            real = path.resolve(strict=path.is_symlink())
        except (OSError, RuntimeError):
            raise BadCheckpoint(f"{path} is a link that leads nowhere; remove it") from None
        if not any(real.is_relative_to(place) for place in allowed):
            raise BadCheckpoint(
                f"{path} is a link out of its folder, to {real}; put a copy of the file there"
            )
        if path.exists() and not path.is_file() and not path.is_dir():
            raise BadCheckpoint(f"{path} is neither a file nor a folder; remove it")
