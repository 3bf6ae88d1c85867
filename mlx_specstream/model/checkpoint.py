"""The streams folder: ``streams.safetensors`` + ``streams.json``, tied to a base by a fingerprint.

The format is specified in ``docs/format.md``.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..config import FORMAT_VERSION, StreamConfig
from ..errors import BadCheckpoint, StreamsMismatch
from .draft_head import broken_rule
from .projections import embedding_of, hidden_size, stream_shapes, weight_shape
from .streams import Streams

WEIGHTS, DESCRIPTION = "streams.safetensors", "streams.json"
VOCABULARY = "draft_vocabulary"  # a tensor that is no parameter
CALIBRATION = "calibration"  # an entry of streams.json that may be missing
SAMPLES = 16  # weights read per sketched tensor
SAME = 0.9999  # cosine of two sketches: above, the very same weights up to a cast to bf16
ALIKE = 0.85  # above, the same weights quantised (2 bits: 0.91); other models lie near 0


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Architecture, shapes and a small sketch of the (dequantised) weights of a base model."""
    layers = model.layers
    shapes, sketch = {}, []
    picked = sorted({0, len(layers) // 2, len(layers) - 1})
    tensors = [("embedding", embedding_of(model))]
    tensors += [
        (f"{i}.{path}", module)
        for i in picked
        for path, module in sorted(layers[i].named_modules())
        if getattr(module, "weight", None) is not None and module.weight.ndim >= 2
    ]
    for name, module in tensors:
        if name.rpartition(".")[2] in ("linear", "embedding", "conv") and name != "embedding":
            name = name.rpartition(".")[0]  # the linear inside mlx-lm's LoRA layers
        shapes[name] = list(weight_shape(module))
        sketch += _samples(module)
    return {
        "model_type": getattr(model, "model_type", type(model).__module__.rpartition(".")[2]),
        "num_layers": len(layers),
        "shapes": shapes,
        "sketch": [float(f"{x:.6g}") for x in sketch],
    }


def compare(saved: dict[str, Any], actual: dict[str, Any]) -> tuple[str, str]:
    """('same' | 'alike' | 'other', why) for two fingerprints."""
    for key in ("model_type", "num_layers", "shapes"):
        if saved.get(key) != actual[key]:
            old, new = saved.get(key), actual[key]
            if key == "shapes":
                names = [n for n in {**(old or {}), **new} if (old or {}).get(n) != new.get(n)]
                key, old, new = f"shape of {names[0]}", (old or {}).get(names[0]), new.get(names[0])
            return "other", f"{key} is {new}, the streams were trained on {old}"
    a, b = np.array(saved["sketch"], dtype=np.float64), np.array(actual["sketch"], dtype=np.float64)
    if a.shape != b.shape:
        return "other", "the weight sketches have different lengths"
    # Each tensor counts alike, whatever its scale.
    a, b = (x.reshape(-1, SAMPLES) for x in (a, b))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = float(np.mean((a * b).sum(axis=1) / np.maximum(norms, 1e-30)))
    kind = "same" if cosine >= SAME else "alike" if cosine >= ALIKE else "other"
    return kind, f"weights agree to a cosine of {cosine:.4f}"


def save_streams(
    folder: str | Path, streams: Streams, base: dict[str, Any], training: dict[str, Any]
) -> None:
    """Write a streams folder. Each file appears whole or not at all.

    Args:
        base: ``fingerprint`` of the base model.
        training: how they were trained (free-form, for people).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "format_version": FORMAT_VERSION,
        "config": streams.config.to_json(),
        "base": base,
        "training": training,
    }
    if streams.temperatures is not None:
        description[CALIBRATION] = {"temperatures": [float(t) for t in streams.temperatures]}
    weights = dict(tree_flatten(streams.parameters()))
    if streams.draft_vocabulary is not None:
        weights[VOCABULARY] = mx.array(streams.draft_vocabulary)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".streams-") as temporary:
        temporary = Path(temporary)
        save_tensors(temporary / WEIGHTS, weights, {"format": "mlx-specstream"})
        (temporary / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
        for name in (WEIGHTS, DESCRIPTION):
            os.replace(temporary / name, folder / name)


def save_draft_vocabulary(folder: str | Path, tokens: np.ndarray | None) -> None:
    """Put a draft vocabulary (int32 [F]) into a streams folder, or take it out (None).

    Nothing else in the folder changes, and the one file that does is replaced in one go.
    """
    path = Path(folder) / WEIGHTS
    weights, metadata = _read_weights(path)
    weights.pop(VOCABULARY, None)
    if tokens is not None:
        weights[VOCABULARY] = mx.array(tokens)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".streams-") as temporary:
        save_tensors(Path(temporary) / WEIGHTS, weights, metadata)
        os.replace(Path(temporary) / WEIGHTS, path)


def save_tensors(path: Path, tensors: dict[str, mx.array], metadata: dict[str, str]) -> None:
    """Write a safetensors file; a failed write (a full disk) is one clear line and leaves nothing."""
    try:
        mx.save_safetensors(str(path), tensors, metadata)
    except RuntimeError as error:
        path.unlink(missing_ok=True)
        line = str(error).splitlines()[0]
        raise BadCheckpoint(
            f"[save] {path} cannot be written ({line}); is the disk full?"
        ) from None


def find_streams(model_folder: Path) -> Path | None:
    """The streams that lie inside a model folder, if any: beside the weights or in ``streams/``."""
    for folder in (model_folder, model_folder / "streams"):
        if (folder / DESCRIPTION).is_file():
            return folder
    return None


def read_description(folder: str | Path) -> dict[str, Any]:
    """Read and check ``streams.json``.

    Raises:
        BadCheckpoint: missing, not JSON, unknown version, or a broken rule in it.
    """
    folder = Path(folder)
    for name in (DESCRIPTION, WEIGHTS):
        if not (folder / name).is_file():
            raise BadCheckpoint(
                f"[streams] a streams folder holds {DESCRIPTION} and {WEIGHTS}, but "
                f"{folder / name} is missing; make one with mlx-specstream train."
            )
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        version = description["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint(f"[streams] {folder / DESCRIPTION} is damaged: {error!r}.") from None
    if version != FORMAT_VERSION:
        raise BadCheckpoint(
            f"[streams] {folder / DESCRIPTION} has format_version {version!r}, this version of "
            f"mlx-specstream reads {FORMAT_VERSION}; update mlx-specstream or train streams anew."
        )
    try:
        description["config"] = StreamConfig.from_json(description["config"])
        dict(description["base"]["shapes"])
        if np.array(description["base"]["sketch"], dtype=np.float64).ndim != 1:
            raise ValueError("sketch must be a list of numbers")
        temperatures_of(description)
    except (KeyError, TypeError, ValueError) as error:  # BadArgument is a ValueError
        raise BadCheckpoint(
            f"[streams] {folder / DESCRIPTION} is damaged: {str(error).rstrip('.')}."
        ) from None
    return description


def load_streams(
    folder: str | Path, model: nn.Module, force: bool = False
) -> tuple[Streams, str | None]:
    """Read the streams of ``model`` from a folder.

    Args:
        force: load streams of another base all the same, if they fit (lossless streams only: a
            wrong base costs speed, never text).

    Returns:
        The streams, and a note for the user or None.

    Raises:
        BadCheckpoint: the folder is damaged or does not match its own description.
        StreamsMismatch: the streams belong to another base.
    """
    folder = Path(folder)
    description = read_description(folder)
    config = description["config"]
    kind, why = compare(description["base"], fingerprint(model))
    note = None
    if kind == "other" and not (force and not config.main_sees_streams):
        remedy = (
            "train streams for this model"
            if config.main_sees_streams
            else "train streams for this model, or use --force (slower, same text)"
        )
        raise StreamsMismatch(f"[streams] {folder} belongs to another base: {why}; {remedy}.")
    if kind != "same":
        note = f"streams {folder}: {why}; they still draft, acceptance may differ."
    if config.msa_layers > len(model.layers):
        raise StreamsMismatch(
            f"[streams] {folder} has {config.msa_layers} MSA layers, the model {len(model.layers)}."
        )
    V, token_width = weight_shape(embedding_of(model))
    shapes = stream_shapes(model, config)
    streams = Streams(config, hidden_size(model), shapes, token_width=token_width)
    streams.temperatures = temperatures_of(description)
    weights, _ = _read_weights(folder / WEIGHTS)
    vocabulary = weights.pop(VOCABULARY, None)
    if vocabulary is not None:
        why = broken_rule(vocabulary, V)
        if why:
            raise BadCheckpoint(f"[streams] {folder / WEIGHTS}: {VOCABULARY} {why}.")
        streams.draft_vocabulary = np.array(vocabulary)
    expected = dict(tree_flatten(streams.parameters()))
    for name in sorted(expected.keys() | weights.keys()):
        want = expected[name].shape if name in expected else "nothing"
        got = weights[name].shape if name in weights else "nothing"
        if want != got:
            kind = StreamsMismatch if force else BadCheckpoint
            raise kind(f"[streams] {folder / WEIGHTS}: {name} must be {want}, got {got}.")
    streams.load_weights(list(weights.items()))
    mx.eval(streams.parameters())
    return streams, note


def temperatures_of(description: dict[str, Any]) -> np.ndarray | None:
    """Of the streams, float32 [g], if ``streams.json`` has them.

    Args:
        description: its ``calibration``, if any, and its ``config``, a ``StreamConfig``.

    Raises: KeyError, TypeError or ValueError for damage.
    """
    if CALIBRATION not in description:
        return None
    found = np.array(description[CALIBRATION]["temperatures"], dtype=np.float32)
    g = description["config"].num_streams
    if found.shape != (g,) or not (np.isfinite(found) & (found > 0)).all():
        raise ValueError(f"temperatures must be {g} numbers > 0")
    return found


def _read_weights(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The tensors of a streams folder, its draft vocabulary among them, and the file's metadata."""
    try:
        return mx.load(str(path), return_metadata=True)
    except (RuntimeError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise BadCheckpoint(f"[streams] {path} cannot be read: {line}") from None


def _samples(module: nn.Module) -> list[float]:
    """SAMPLES weights of one row in the middle, evenly spaced, dequantised."""
    rows = module.weight.reshape(-1, module.weight.shape[-1])
    middle = rows.shape[0] // 2
    if hasattr(module, "bits"):
        parts = [module.weight, module.scales, module.get("biases")]
        row = mx.dequantize(
            *(
                None if p is None else p.reshape(-1, p.shape[-1])[middle : middle + 1]
                for p in parts
            ),
            group_size=module.group_size,
            bits=module.bits,
            mode=getattr(module, "mode", "affine"),
        )[0]
    else:
        row = rows[middle]
    row = np.array(row.astype(mx.float32))
    return [float(row[i * len(row) // SAMPLES]) for i in range(SAMPLES)]
