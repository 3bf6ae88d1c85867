"""Parts of mlx-lm's layers that our own passes compute in another way on MLX's CPU backend.

MLX computes ``exp`` there one element at a time, so what holds an exponential weighs as much as a
product of rows. Plain decoding, one row at a time, hardly notices; a pass over a tree does. The parts
here are sums and products instead, compiled, about as exact as float32 makes the stock ones.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations, base

from .activation import fast_swiglu
from .attention import rows_attention

COMPILER = shutil.which("g++") is not None  # what MLX calls; without it the parts run one by one


class Part(NamedTuple):
    """A function of mlx-lm that its model files import by name, and what takes its place."""

    name: str
    stock: Callable
    ours: Callable


PARTS = (
    Part("swiglu", activations.swiglu, fast_swiglu),
    Part("scaled_dot_product_attention", base.scaled_dot_product_attention, rows_attention),
)


class Place(NamedTuple):
    """Where a model's layers call a part: a Python module."""

    module: object
    part: Part


def places_of(layers: list[nn.Module]) -> list[Place]:
    """The modules in which the layers' own code finds the parts."""
    names = {type(m).__module__ for layer in layers for _, m in layer.named_modules()}
    modules = [sys.modules[name] for name in sorted(names) if name in sys.modules]
    return [
        Place(module, part)
        for part in PARTS
        for module in modules
        if getattr(module, part.name, None) is part.stock
    ]


@contextmanager
def quicker_parts(places: list[Place]) -> Iterator[None]:
    """While a pass of our own is built on a CPU, its layers call our parts there.

    The modules are the process's: another thread that runs a model of theirs meets our parts, too.
    """
    if mx.default_device().type != mx.DeviceType.cpu or not COMPILER:
        places = []
    try:
        for module, part in places:
            setattr(module, part.name, part.ours)
        yield
    finally:
        for module, part in places:
            setattr(module, part.name, part.stock)
