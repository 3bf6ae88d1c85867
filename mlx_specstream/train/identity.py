"""A short name of exactly these weights, for what is kept beside them."""

from __future__ import annotations

import hashlib
import json

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..model.checkpoint import fingerprint


def identity(model: nn.Module) -> str:
    """16 hex digits: of the base's fingerprint and, if it has any, of its LoRA and DoRA.

    A fingerprint leaves adapters out, as streams may serve a base with and without them; what the
    model says, or computes below the cut, may not be mistaken so.
    """
    adapters = {
        name: float(f"{mx.abs(value.astype(mx.float32)).sum().item():.6g}")
        for name, value in tree_flatten(model.parameters())
        if name.rpartition(".")[2] in ("lora_a", "lora_b", "m")
    }
    text = json.dumps([fingerprint(model), adapters], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
