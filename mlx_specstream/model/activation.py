"""The gate of a SwiGLU block for MLX's CPU backend, where an exponential costs as much as a product
of rows.

MLX computes ``exp`` there one element at a time. A pass over many rows spends a tenth of its time
in it, which plain decoding, one row at a time, hardly notices. The sigmoid below is a quotient of
two polynomials: a compiled kernel of products and sums, which the C++ compiler turns into vector
code. It differs from the exact sigmoid by at most 2e-7, float32's own rounding.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu

# sigmoid(x) = 1/2 + x P(x^2) / Q(x^2) for |x| <= 18, fitted to tanh by weighted least squares.
REACH = 18.0
P = (0.249999997, 0.00836710185, 5.47318325e-05, 8.09219379e-08, 1.31618405e-11)
Q = (1.0, 0.116801713, 0.00161908107, 5.15151632e-06, 3.05950289e-09)


@partial(mx.compile, shapeless=True)
def fast_swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """gate * sigmoid(gate) * x for float32; anything else goes the stock way."""
    if gate.dtype != mx.float32:
        return swiglu(gate, x)
    clipped = mx.clip(gate, -REACH, REACH)
    square = clipped * clipped
    over, under = P[-1], Q[-1]
    for p, q in zip(P[-2::-1], Q[-2::-1], strict=True):
        over, under = over * square + p, under * square + q
    return gate * (0.5 + clipped * over / under) * x


COMPILER = shutil.which("g++") is not None  # what MLX calls; without it the parts run one by one


def modules_with_swiglu(layers: list[nn.Module]) -> list:
    """The Python modules whose blocks call mlx-lm's ``swiglu``."""
    names = {type(m).__module__ for layer in layers for _, m in layer.named_modules()}
    found = [sys.modules[name] for name in sorted(names) if name in sys.modules]
    return [module for module in found if getattr(module, "swiglu", None) is swiglu]


@contextmanager
def fast_activations(modules: list) -> Iterator[None]:
    """While our own passes are built on a CPU, these modules use ``fast_swiglu``."""
    if mx.default_device().type != mx.DeviceType.cpu or not COMPILER:
        modules = []
    for module in modules:
        module.swiglu = fast_swiglu
    try:
        yield
    finally:
        for module in modules:
            module.swiglu = swiglu
