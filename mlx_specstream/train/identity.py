"""A short name of exactly these weights, for what is kept beside them."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..model.checkpoint import fingerprint

SAME = 1e-3  # relative: a cast to bfloat16 changes a sum by less


def identity(model: nn.Module) -> str:
    """16 hex digits: of the base's fingerprint and, if it has any, of its LoRA and DoRA.

    A fingerprint leaves adapters out, as streams may serve a base with and without them; what the
    model says, or computes below the cut, may not be mistaken so.
    """
    return identity_from(fingerprint(model), adapters_of(model))


def identity_from(base: dict[str, Any], adapters: dict[str, float]) -> str:
    """The same from a fingerprint and ``adapters_of``, for who has both."""
    text = json.dumps([base, adapters], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def adapters_of(model: nn.Module) -> dict[str, float]:
    """Name -> the sum of the sizes of its numbers, for every array of LoRA or DoRA."""
    return {
        name: float(f"{mx.abs(value.astype(mx.float32)).sum().item():.6g}")
        for name, value in tree_flatten(model.parameters())
        if name.rpartition(".")[2] in ("lora_a", "lora_b", "m")
    }


def same_adapters(a: dict[str, float], b: dict[str, float]) -> bool:
    """Are they the same up to another dtype or another machine's sum?"""
    return a.keys() == b.keys() and all(math.isclose(a[k], b[k], rel_tol=SAME) for k in a)
