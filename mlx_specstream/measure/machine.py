"""What a result file says about where it was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version

import mlx.core as mx

from .. import blas


def about_machine() -> dict:
    """System, chip, memory, device, BLAS and versions, all as they are on this machine."""
    about = mx.device_info()
    return {
        "system": platform.platform(terse=True),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory_bytes() / 1e9, 1),
        "device": str(mx.default_device()),
        "device_name": str(about.get("device_name", "")),
        "architecture": str(about.get("architecture", "")),
        "blas": blas.name(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("mlx", "mlx-lm", "mlx-specstream")},
    }


def cpu_name() -> str:
    """As the vendor calls it ("Apple M3 Max"); ``platform`` knows the architecture only."""
    if sys.platform == "darwin":
        done = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True
        )
        return done.stdout.strip() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
