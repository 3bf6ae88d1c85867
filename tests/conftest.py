"""Settings of the whole suite: offline, on the CPU, tiny models, no compiled kernels."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from importlib.metadata import version
from pathlib import Path

import mlx_specstream  # before mlx: it picks the BLAS  # isort: skip
import mlx.core as mx
import pytest

from mlx_specstream import blas

# Tolerances here are those of the CPU backend; SPECSTREAM_DEVICE=gpu tries the default device.
if os.environ.get("SPECSTREAM_DEVICE", "cpu") == "cpu":
    mx.set_default_device(mx.cpu)
# Every new shape would start a C++ compiler; test_sampling.py compiles where it matters.
mx.disable_compile()


def pytest_report_header(config):
    names = ("mlx", "mlx-lm", "numpy", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return [
        f"mlx-specstream {mlx_specstream.__version__}; {versions}",
        f"device {mx.default_device()}, BLAS {blas.name()}",
    ]


@pytest.fixture(autouse=True)
def kernels_are_there(monkeypatch):
    """As on a machine where ``mlx-specstream tune`` ran; test_compiling.py does without."""
    monkeypatch.setattr("mlx_specstream.decode.compiling.waits_for_compiler", lambda: False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Models and data outside the repository; tests that need them are skipped without."""
    default = Path(__file__).resolve().parents[1].parent / "shared"
    folder = Path(os.environ.get("SPECSTREAM_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no folder of models and data at {folder}; set SPECSTREAM_DATA to one")
    return folder
