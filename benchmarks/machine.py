"""What a result file says about where and how it was measured."""

import os

from mlx_specstream.measure.machine import about_machine

__all__ = ["about_machine", "arguments"]
PATHS = ("model", "streams", "work")


def arguments(args) -> dict:
    """The arguments of a run; of folders the name only."""
    named = {k: os.path.basename(str(v).rstrip("/")) for k, v in vars(args).items() if k in PATHS}
    return {**{k: v for k, v in vars(args).items() if k != "out"}, **named}
