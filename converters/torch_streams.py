"""Streams as PyTorch names them, both ways (the tables of docs/format.md).

A PyTorch program that trains streams saves them under these names, alone or in one state dict with
the base; `stream_config` (the JSON of a StreamConfig) says what they are: in the metadata of a
safetensors file, or as an entry beside the pickled state dict.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_specstream.config import StreamConfig
from mlx_specstream.errors import BadCheckpoint
from mlx_specstream.model.checkpoint import (
    CALIBRATION,
    VOCABULARY,
    WEIGHTS,
    fingerprint,
    read_description,
    save_streams,
    temperatures_of,
)
from mlx_specstream.model.draft_head import broken_rule
from mlx_specstream.model.projections import embedding_of, hidden_size, stream_shapes, weight_shape
from mlx_specstream.model.streams import Streams

from .plausible import check_plausible
from .safetensors_header import check_safetensors
from .safetensors_writer import write_safetensors

CONFIG, BASE, TRAINING = "stream_config", "stream_base", "stream_training"
BESIDE = (CONFIG, BASE, TRAINING, "stream_calibration")  # what describes the tensors
FILE = "pytorch_streams.safetensors"
# (in PyTorch, in a streams folder, whether the last two axes are swapped)
NAMES = (
    ("stream_embeddings.weight", "embeddings", False),
    ("msa_layers.*.*.lora_A.weight", "lora.*.*.a", True),
    ("msa_layers.*.*.lora_B.weight", "lora.*.*.b", True),
    ("stream_init.lora_A.weight", "init.a", True),
    ("stream_init.lora_B.weight", "init.b", True),
    ("early_exit.lora_A.weight", "early_exit.a", True),
    ("early_exit.lora_B.weight", "early_exit.b", True),
    ("condition.embedding.weight", "condition.a", True),
    ("condition.state.weight", "condition.c", True),
    ("condition.bias", "condition.d", False),
    ("condition.out.weight", "condition.b", True),
    ("root.embedding.weight", "root.a", True),
    ("root.state.weight", "root.c", True),
    ("root.bias", "root.d", False),
    ("root.out.weight", "root.b", True),
    (VOCABULARY, VOCABULARY, False),
)


class TorchStreams(NamedTuple):
    """Streams in PyTorch's layout: tensors by their names there, and what describes them (`BESIDE`)."""

    tensors: dict[str, mx.array]
    config: Any  # the JSON of a StreamConfig: text, or already an object
    base: Any = None  # the fingerprint of the base, where it is known
    training: Any = None
    calibration: Any = None


def pattern(template: str) -> re.Pattern:
    return re.compile(re.escape(template).replace(r"\*", r"([A-Za-z0-9_]+)"))


def renamed(name: str, back: bool) -> tuple[str, bool] | None:
    """A tensor's name on the other side, and whether its last two axes are swapped there.

    Args:
        back: from a streams folder to PyTorch; else the other way.
    """
    for torch, ours, swap in NAMES:
        source, target = (ours, torch) if back else (torch, ours)
        found = pattern(source).fullmatch(name)
        if found:
            return target.replace("*", "{}").format(*found.groups()), swap
    return None


def is_stream(name: str) -> bool:
    """Whether a tensor of a PyTorch checkpoint belongs to streams."""
    return renamed(name, back=False) is not None


def swapped(array: mx.array, swap: bool) -> mx.array:
    return mx.contiguous(mx.swapaxes(array, -1, -2)) if swap else array


def parsed(value: Any, what: str) -> Any:
    """An object that is stored as JSON text, or as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{what} is not JSON ({str(error)[:100]})") from None


def build_streams(source: TorchStreams, model) -> Streams:
    """The streams of `model` (the base, lazy or not) out of PyTorch's tensors.

    Without the base (None) the tensors themselves tell the sizes.

    Raises: BadCheckpoint when the description breaks a rule, or a tensor is missing, unknown or of
    another shape than base and description say. Shapes are told as PyTorch has them.
    """
    if source.config is None:
        raise BadCheckpoint(
            f"the stream tensors have no {CONFIG!r}: write the JSON of a StreamConfig into the "
            "metadata of the safetensors file, or beside the pickled state dict (docs/format.md)"
        )
    try:
        about = parsed(source.config, CONFIG)
        check_plausible(about, CONFIG)
        config = StreamConfig.from_json(about)
    except (TypeError, ValueError) as error:  # BadArgument is a ValueError
        raise BadCheckpoint(f"{CONFIG}: {error}") from None
    calibration = parsed(source.calibration, BESIDE[-1])
    try:
        beside = {} if calibration is None else {CALIBRATION: calibration}
        temperatures = temperatures_of({"config": config, **beside})
    except (KeyError, TypeError, ValueError) as error:
        raise BadCheckpoint(f"{BESIDE[-1]} is damaged: {error}") from None
    tensors = dict(source.tensors)
    vocabulary = tensors.pop(VOCABULARY, None)
    if model is None:
        streams, size = Streams(config, **sizes_in(tensors, config)), 1 << 31
    elif config.msa_layers > len(model.layers):
        raise BadCheckpoint(
            f"{CONFIG}: 'msa_layers' is {config.msa_layers} but the base has {len(model.layers)}"
        )
    else:
        size, narrow = weight_shape(embedding_of(model))
        shapes = stream_shapes(model, config)
        streams = Streams(config, hidden_size(model), shapes, token_width=narrow)
    if vocabulary is not None:
        vocabulary = vocabulary.astype(mx.int32)
        if why := broken_rule(vocabulary, size):
            raise BadCheckpoint(f"{VOCABULARY} {why}")
    expected = {}
    for name, value in tree_flatten(streams.parameters()):
        torch, swap = renamed(name, back=True)
        expected[torch] = swapped(value, swap).shape
    for name in sorted(expected.keys() | tensors.keys()):
        want, got = expected.get(name, "nothing"), getattr(tensors.get(name), "shape", "nothing")
        if want != got:
            raise BadCheckpoint(f"stream tensor {name!r} must be {want} but is {got}")
    ours = []
    for name, value in tensors.items():
        new, swap = renamed(name, back=False)
        ours.append((new, swapped(value, swap).astype(mx.float32)))
    streams.load_weights(ours)
    mx.eval(streams.parameters())
    streams.temperatures = temperatures
    if vocabulary is not None:
        streams.draft_vocabulary = vocabulary
    return streams


def sizes_in(tensors: dict[str, mx.array], config: StreamConfig) -> dict[str, Any]:
    """What `Streams` needs to know of a base, read off the tensors (in PyTorch's layout)."""
    last = {name: value.shape[-1] for name, value in tensors.items() if value.ndim}
    widths = [
        *(last.get("stream_embeddings.weight"), last.get("stream_init.lora_A.weight")),
        *(last.get("early_exit.lora_A.weight"), last.get("condition.state.weight")),
        *(last.get("root.state.weight"), 1),
    ]
    shapes: list[dict[str, tuple[int, int]]] = [{} for _ in range(config.msa_layers)]
    for name, value in tensors.items():
        found = re.fullmatch(r"msa_layers\.(\d+)\.(.+)\.lora_A\.weight", name)
        other = tensors.get(name.replace(".lora_A.", ".lora_B."))
        if found and int(found[1]) < len(shapes) and other is not None:
            shapes[int(found[1])][found[2]] = (value.shape[-1], other.shape[0])
    width = next(size for size in widths if size)
    narrow = last.get("condition.embedding.weight", last.get("root.embedding.weight", width))
    return {"width": width, "shapes": shapes, "token_width": narrow}


def write_streams(source: TorchStreams, model, folder: Path) -> None:
    """A streams folder of PyTorch's tensors; full precision, whatever becomes of the base.

    Args:
        model: the base before it is quantised: its fingerprint is the one to keep. None where the
            file brings its own.
    """
    built = build_streams(source, model)
    base = parsed(source.base, BASE) if model is None else fingerprint(model)
    training = parsed(source.training, TRAINING) or {"origin": "PyTorch"}
    save_streams(folder, built, base, training)
    read_description(folder)  # the file's own words may be damaged


def read_streams_folder(folder: Path) -> TorchStreams:
    """A streams folder in PyTorch's layout; its base is not needed."""
    description = read_description(folder)
    check_safetensors(folder / WEIGHTS)
    try:
        tensors = mx.load(str(folder / WEIGHTS))
    except (RuntimeError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise BadCheckpoint(f"{folder / WEIGHTS} cannot be read: {line}") from None
    named = {}
    for name, value in tensors.items():
        new = renamed(name, back=True)
        if new is None:
            raise BadCheckpoint(f"{folder / WEIGHTS}: unknown tensor {name!r}")
        named[new[0]] = swapped(value, new[1])
    config = description["config"].to_json()
    return TorchStreams(
        named,
        config,
        description["base"],
        description.get("training"),
        description.get(CALIBRATION),
    )


def write_torch_streams(streams: TorchStreams, path: Path) -> None:
    """One safetensors file that PyTorch reads with `safetensors.torch.load_file`."""
    about = zip(BESIDE, streams[1:], strict=True)
    metadata = {key: json.dumps(value) for key, value in about if value is not None}
    write_safetensors(path, dict(streams.tensors), {"format": "pt", **metadata})
