"""What passes cost on this machine, for this model: measured by ``tune``, or a cautious guess."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .. import blas
from ..model.projections import embedding_of
from ..model.seams import Seams
from ..profile import load_profile, profile_key
from .costs import Costs, default_costs


def costs_for(seams: Seams) -> Costs:
    """What was just measured (``kept``), what ``mlx-specstream tune`` stored, or default costs."""
    if (now := seams.kept.get("costs")) is not None:
        return now
    known = load_profile(costs_key(seams), lambda profile: Costs.from_json(profile["costs"]))
    return known or default_costs_of(seams)


def default_costs_of(seams: Seams) -> Costs:
    """A cautious curve for a model on a machine where nothing was measured."""
    config = seams.streams.config if seams.streams else None
    return default_costs(
        "gpu" if mx.default_device() == mx.gpu else "cpu",
        seams.num_layers,
        config.msa_layers if config else 1,
        streams=config.num_streams if config else 4,
        linear=_rows_cost_like_tokens(seams),
    )


def _rows_cost_like_tokens(seams: Seams) -> bool:
    """The reference BLAS, and affine quantisation on M1 and M2, read the weights once per row."""
    if mx.default_device() == mx.cpu:
        return blas.is_slow()
    old = any(g in str(mx.device_info().get("architecture", "")) for g in ("g13", "g14"))
    return old and any(
        getattr(m, "mode", "affine") == "affine"
        for _, m in seams.model.named_modules()
        if hasattr(m, "bits")
    )


def costs_key(seams: Seams) -> dict[str, Any]:
    """What measured costs hold for: machine, model, quantisation, streams, library versions."""
    embedding = embedding_of(seams.model)
    arrays = [array for _, array in tree_flatten(seams.model.parameters())]
    quantized = [m for _, m in seams.model.named_modules() if hasattr(m, "bits")]
    kinds = {(m.bits, m.group_size, getattr(m, "mode", "affine")) for m in quantized}
    return profile_key(
        machine=machine_name(),
        model=(
            f"{getattr(seams.model, 'model_type', type(seams.model).__name__)}, "
            f"{seams.num_layers} layers, {seams.vocabulary_size} tokens, "
            f"{sum(a.size for a in arrays)} numbers"
        ),
        quantization=" ".join(f"{b}-bit g{g} {m}" for b, g, m in sorted(kinds)) or "none",
        dtype=str(getattr(embedding, "scales", embedding.weight).dtype).removeprefix("mlx.core."),
        streams=None if seams.streams is None else _geometry(seams),
        versions={name: version(name) for name in ("mlx", "mlx-lm", "mlx-specstream")},
    )


def machine_name() -> str:
    """Chip, device, cores, BLAS: whatever changes the speed."""
    device = mx.default_device()
    parts = [str(device), platform.machine(), f"{os.cpu_count()} cores"]
    if device == mx.gpu:
        parts.append(str(mx.device_info().get("device_name", "")))
    else:
        parts.append(blas.name())
    return ", ".join(parts)


def _geometry(seams: Seams) -> dict[str, Any]:
    config = seams.streams.config.to_json()
    plain = {k: " ".join(v) if isinstance(v, list) else v for k, v in config.items()}
    vocabulary = seams.draft_vocabulary
    return {**plain, "draft_vocabulary": 0 if vocabulary is None else vocabulary.size}
