"""A fast BLAS for MLX's CPU backend on Linux, found before MLX loads.

MLX's Linux CPU wheel links the reference BLAS, whose cost grows with every row, so drafting cannot
pay. A library loaded first with global symbols takes its place. Whoever imports ``mlx.core`` before
us is too early for that; then nothing changes and ``name()`` says so.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

FAST = ("openblas", "mkl_rt", "blis")


def load_fast_blas() -> None:
    """Load OpenBLAS for MLX if it is on this Linux machine and MLX is not loaded yet."""
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return
    for library in ("libopenblas.so.0", str(Path(sys.prefix) / "lib/libmkl_rt.so.3")):
        try:
            ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
            return
        except OSError:
            continue


def name() -> str:
    """The BLAS in use, in words."""
    if sys.platform == "darwin":
        return "Accelerate"
    # Libraries that numpy and others carry have suffixed symbols and serve only themselves.
    mapped = Path("/proc/self/maps").read_text().splitlines() if sys.platform == "linux" else []
    files = [line.split()[-1] for line in mapped if "/" in line]
    order = list(dict.fromkeys(f for f in files if ".so" in f))
    for file in order:
        base = Path(file).name
        if any(f in base for f in FAST) and "numpy" not in file and "scipy" not in file:
            return base.split(".so")[0].removeprefix("lib")
    return "reference BLAS (slow: install libopenblas0-pthread)"


def is_slow() -> bool:
    return name().startswith("reference")
