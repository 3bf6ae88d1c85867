"""What a result file says about where it was measured."""

import os
import platform
from importlib.metadata import version

import mlx.core as mx

from mlx_specstream import blas

PATHS = ("model", "streams")


def arguments(args) -> dict:
    """The arguments of a run; of folders the name only."""
    named = {k: os.path.basename(str(v).rstrip("/")) for k, v in vars(args).items() if k in PATHS}
    return {**{k: v for k, v in vars(args).items() if k != "out"}, **named}


def about_machine() -> dict:
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return {
        "system": platform.platform(terse=True),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "device": str(mx.default_device()),
        "blas": blas.name(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("mlx", "mlx-lm", "mlx-specstream")},
    }
