"""When a step is compiled: always, except where MLX would first have to run a C++ compiler.

On a Linux CPU MLX turns every fused operation into C++ and compiles it, about a second each, and keeps
it in the system's temporary folder. A step has some seventy of them. So passes run uncompiled there
until ``mlx-specstream tune`` (or ``bench``) has made the kernels, and left a mark beside them: both
go together when that folder is emptied.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from ..model.seams import Seams
from ..profile import profile_path
from .buckets import Buckets
from .costs_here import costs_key


def compiles(seams: Seams) -> bool:
    """Are this model's passes compiled? Found out once; ``seams.compiles`` says it from then on."""
    if seams.compiles is None:
        seams.compiles = not waits_for_compiler() or mark_of(seams).is_file()
    return seams.compiles


def compile_from_now_on(seams: Seams) -> None:
    """Whatever it takes: somebody is about to time passes."""
    if not compiles(seams):
        seams.compiles = True
        seams.kept.pop("buckets", None)


@contextmanager
def compiled_at_once(seams: Seams) -> Iterator[None]:
    """Meanwhile every bucket is compiled when it is first used, in traces of its own."""
    compile_from_now_on(seams)
    before = seams.kept.get("buckets")
    seams.kept["buckets"] = Buckets(worth=0)
    try:
        yield
    finally:
        del seams.kept["buckets"]
        if before is not None:
            seams.kept["buckets"] = before


def remember_kernels(seams: Seams) -> None:
    """The kernels of this model's passes are there now; best effort."""
    if waits_for_compiler():
        # Without the mark the next process runs uncompiled, which is slower and no worse.
        with suppress(OSError):
            mark_of(seams).touch()


def mark_of(seams: Seams) -> Path:
    """The file that says so, in MLX's folder of kernels."""
    folder = Path(tempfile.gettempdir()) / "mlx" / version("mlx") / "cpu"
    return profile_path(costs_key(seams), folder).with_suffix(".specstream")


def waits_for_compiler() -> bool:
    """Without one MLX runs the parts of a fused operation one by one."""
    return mx.default_device().type == mx.DeviceType.cpu and shutil.which("g++") is not None
