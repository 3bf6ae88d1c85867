"""``train.json``: what a run did, whole at every moment, for people and for plots. Numbers, no text."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..files import write_text

RECORD, CURVES = "train.json", "train.svg"  # the curves are drawn by whoever can
VERSION = 1
ANCESTORS = 3  # runs that a description tells of, where streams went on from streams


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("mlx", "mlx-lm", "mlx-specstream")}


def write_record(folder: Path, about: dict[str, Any]) -> None:
    """Write ``train.json``, whole or not at all."""
    write_text(folder / RECORD, json.dumps({"version": VERSION, **about}, indent=1) + "\n")


def ancestry(training: Any, depth: int = ANCESTORS) -> Any:
    """``training`` of the streams that a run began from, cut where it would go on for ever."""
    if not isinstance(training, dict) or "began_from" not in training:
        return training
    older = ancestry(training["began_from"], depth - 1) if depth > 1 else None
    return {**training, "began_from": older}
