"""Hugging Face checkpoints to mlx-lm folders: `from mlx_specstream.converters import convert`."""

# The folder sits at the top of the repository and is installed inside the package; importing it
# as a plain `converters` would load every file twice under two names.
if __name__ != "mlx_specstream.converters":
    raise ImportError("import mlx_specstream.converters instead (pip install -e .)")

__all__ = ["convert"]


def __getattr__(name):
    if name == "convert":  # lazy: the command line reads `--help` without mlx
        from .conversion import convert

        return convert
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
