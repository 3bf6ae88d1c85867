"""Folders that appear whole, under their name, or not at all."""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mlx_specstream.errors import BadArgument, BadCheckpoint, SpecStreamError

SUFFIX = ".partial"
YOUNG = 60  # seconds; younger than that, a folder may be about to be locked


def check_free(target: Path) -> None:
    """Raise BadArgument where something has the name already."""
    if os.path.lexists(target):
        raise BadArgument(f"{target} already exists; delete it or choose another name")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A hidden sibling of `target` that becomes `target` at the end, or vanishes.

    Raises: SpecStreamError for a full disk or a folder that cannot be written; whatever happens,
    an interrupt included, no partial folder stays behind. One that a killed run left is removed by
    the next run with the same target: nobody holds its lock.
    """
    made, parent = [], target.absolute().parent
    folder = None
    with contextlib.ExitStack() as locks:
        try:
            for missing in reversed([p for p in (parent, *parent.parents) if not p.exists()]):
                missing.mkdir()
                made.append(missing)
            sweep(target)
            folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=SUFFIX, dir=parent))
            with contextlib.suppress(OSError):  # some network disks have no locks
                locks.enter_context(lock(folder))
            yield folder
            os.umask(mask := os.umask(0))
            folder.chmod(0o777 & ~mask)  # mkdtemp makes private folders
            check_free(target)  # somebody else may have been quicker
            folder.rename(target)
        except BaseException as error:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            for empty in reversed(made):
                with contextlib.suppress(OSError):
                    empty.rmdir()
            if isinstance(error, OSError):
                raise disk_error(target, error) from None
            raise


def sweep(target: Path) -> None:
    """Remove hidden folders of this target whose owner is gone."""
    for path in target.absolute().parent.glob(f".{glob.escape(target.name)}.????????{SUFFIX}"):
        with contextlib.suppress(OSError):
            if path.is_dir() and time.time() - path.stat().st_mtime > YOUNG:
                with lock(path):
                    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a folder; the system lets go when the process ends, however it ends.

    Raises: OSError when it is held already.
    """
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(file)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def disk_error(target: Path, error: OSError) -> SpecStreamError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BadCheckpoint(f"cannot write {target}: the disk is full; free some space")
    return BadCheckpoint(f"cannot write {target}: {error}")
