"""Streams that go on learning from a log, in place, with one step back.

streams/            in use
streams/online/     where a run works, gone when it is over
streams/previous/   what was in use before the last run; undo puts it back
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from ..errors import BadCheckpoint
from ..files import write_text
from ..model.checkpoint import DESCRIPTION, WEIGHTS, read_description
from .record import CURVES, RECORD

WORK, PREVIOUS = "online", "previous"
FILES = (WEIGHTS, DESCRIPTION, RECORD, CURVES)  # the last two are for people and may be missing
ADOPTED = "adopted"  # in PREVIOUS: which streams took their place


def adopt(folder: Path) -> None:
    """Put the streams of ``folder/online`` in use; those in use become ``folder/previous``."""
    read_description(folder / WORK)
    stage = folder / f".{PREVIOUS}"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    for name in FILES:
        if (folder / name).is_file():
            shutil.copy2(folder / name, stage)
    write_text(stage / ADOPTED, _digest(folder / WORK))
    shutil.rmtree(folder / PREVIOUS, ignore_errors=True)
    stage.rename(folder / PREVIOUS)
    _move(folder / WORK, folder)
    shutil.rmtree(folder / WORK, ignore_errors=True)


def undo(folder: Path) -> None:
    """Put back the streams that were in use before the last run from a log.

    Raises:
        BadCheckpoint: there are none, or other streams have been put there since.
    """
    if not (folder / PREVIOUS).is_dir():
        raise BadCheckpoint(
            f"[undo] {folder / PREVIOUS} is missing: no run from a log to take back."
        )
    read_description(folder / PREVIOUS)
    adopted = folder / PREVIOUS / ADOPTED
    if not adopted.is_file() or adopted.read_text(encoding="utf-8") != _digest(folder):
        raise BadCheckpoint(
            f"[undo] the streams in {folder} are not those that the last --from-log made, so taking it back "
            f"would lose them; what was there before it is in {folder / PREVIOUS}."
        )
    _move(folder / PREVIOUS, folder)
    shutil.rmtree(folder / PREVIOUS)


def _digest(folder: Path) -> str:
    """Of the weights and of what is said of them (calibration, draft vocabulary)."""
    found = hashlib.sha256()
    for name in (WEIGHTS, DESCRIPTION):
        found.update((folder / name).read_bytes())
    return found.hexdigest()


def _move(source: Path, target: Path) -> None:
    for name in FILES:
        if (source / name).is_file():
            os.replace(source / name, target / name)
        else:
            (target / name).unlink(missing_ok=True)
