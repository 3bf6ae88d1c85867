"""Speculative Streaming on MLX: a language model that drafts its own next tokens.

    from mlx_specstream import load, generate
    model, tokenizer = load("path/to/model", streams="path/to/streams")
    text = generate(model, tokenizer, "MR: name[Aromi]\\nText:", max_tokens=64)

Shapes are written with these letters everywhere:
    B batch           n main nodes or tokens of a pass     g streams (gamma)
    R rows of a pass  T cached tokens                      H query heads, K key/value heads
    D head size       E hidden size (width)                V vocabulary      L sequence length

One step of decoding (``decode/step.py``):
    draft -> lower layers -> prune -> MSA layers -> verify -> commit -> streams -> draft ...
"""

import sys
from importlib import import_module
from types import ModuleType

from .blas import load_fast_blas as _load_fast_blas

_load_fast_blas()  # must come before the first import of mlx.core

__version__ = "0.1.0"

_PUBLIC = {
    "load": "load",
    "generate": "generate",
    "stream_generate": "generate",
    "GenerationResponse": "generate",
    "make_prompt_cache": "model.cache",
    "make_sampler": "decode.choose",
    "StreamConfig": "config",
    "SpecStreamError": "errors",
}
__all__ = [*_PUBLIC, "__version__"]


class _Package(ModuleType):
    """Public names are imported on first use, so that ``--help`` is instant.

    ``load`` and ``generate`` are also names of modules; importing those must not hide the functions.
    """

    def __getattr__(self, name: str):
        if name in _PUBLIC:
            return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value):
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
