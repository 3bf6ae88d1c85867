"""The values that streams begin with."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..config import StreamConfig
from ..errors import BadArgument
from ..model.checkpoint import load_streams
from ..model.projections import embedding_of, hidden_size, stream_shapes, weight_shape
from ..model.seams import Seams
from ..model.streams import Streams
from .data import Example, make_batch
from .passes import base_pass

AT_THE_CUT = ("root", "init", "early_exit")  # they read the hidden states there
EMBEDDING_SHARE = 0.05  # initial P_j against the RMS of the hidden states they are added to


def new_streams(model: nn.Module, config: StreamConfig) -> Streams:
    """Streams with random values from ``mx.random``; ``scale_embeddings`` is to follow."""
    shapes = stream_shapes(model, config)
    if config.lora_rank and not any(shapes):
        raise BadArgument(
            f"[train] none of {', '.join(config.lora_targets)} is a projection of this model; "
            "choose other --lora-targets."
        )
    narrow = weight_shape(embedding_of(model))[1]
    return Streams(config, hidden_size(model), shapes, embedding_scale=1.0, token_width=narrow)


def hidden_rms(seams: Seams, examples: list[Example]) -> float:
    """RMS of M^{N-Ns}, the hidden states that P_j is added to: the median over host rows.

    Not the mean over all rows: the first token of a text is far larger in most models (2.5 times in
    our 14 M one, hundreds of times in some large ones), and streams never start there.
    """
    batch = make_batch(examples, [np.array(e.hosts()) for e in examples], 1)
    cut_hidden, _ = base_pass(seams, mx.array(batch.tokens))
    rms = mx.sqrt(mx.square(cut_hidden.astype(mx.float32)).mean(axis=-1))
    chosen = np.take_along_axis(np.array(rms), batch.hosts, axis=1)
    return float(np.median(chosen[batch.targets[:, 0] >= 0]))


def scale_embeddings(seams: Seams, rms: float) -> None:
    """Make the initial P_j small against the hidden states, of RMS ``rms``, they are added to."""
    if not seams.streams.config.value_rotation:
        seams.streams.embeddings = EMBEDDING_SHARE * rms * seams.streams.embeddings
    mx.eval(seams.streams.parameters())


def begin_from(folder: Path, seams: Seams) -> str:
    """Take over what fits of the streams in ``folder``; returns a line for the user.

    LoRA goes to the layer of the model that it was trained for, at the strength that it had. What was
    trained for the hidden states of another cut does not fit. Their draft vocabulary and temperatures
    come along where there are none yet.
    """
    own = dict(tree_flatten(seams.streams.parameters()))
    old = load_streams(folder, seams.model)[0]
    theirs = _fitted(old, seams.streams.config).items()
    taken = [(name, x) for name, x in theirs if name in own and own[name].shape == x.shape]
    if not taken:
        raise BadArgument(
            f"[train] nothing of the streams in {folder} fits these; train with their --lora-rank, "
            "--msa-layers and --num-streams."
        )
    seams.streams.load_weights(taken, strict=False)
    if seams.streams.draft_vocabulary is None:
        seams.streams.draft_vocabulary = seams.draft_vocabulary = old.draft_vocabulary
    if old.config.num_streams == seams.streams.config.num_streams:
        seams.streams.temperatures = old.temperatures
    mx.eval(seams.streams.parameters())
    return f"{len(taken)} of {len(own)} arrays begin as in {folder}"


def _fitted(old: Streams, new: StreamConfig) -> dict[str, mx.array]:
    """The arrays of ``old`` under the names that they have in streams of another shape."""
    higher = new.msa_layers - old.config.msa_layers  # LoRA is numbered from the cut upwards
    found = {}
    for name, x in tree_flatten(old.parameters()):
        part, _, rest = name.partition(".")
        if part == "lora":
            layer, _, rest = rest.partition(".")
            name = f"lora.{int(layer) + higher}.{rest}"
            if name.endswith(".b"):
                x = x * (old.config.lora_scale / (new.lora_scale or 1.0))
        elif higher and part in AT_THE_CUT:
            continue
        elif part == "condition":
            x = _condition(rest, x, old.config, new)
        if x is not None:
            found[name] = x
    return found


def _condition(name: str, x: mx.array, old: StreamConfig, new: StreamConfig) -> mx.array | None:
    """An array of the correction by the token before, as streams of another shape hold it; None: not at all.

    One map for all streams is a map for each; what each learned for itself is none for all.
    """
    if not old.condition_shared:
        return None if new.condition_shared or new.num_streams != old.num_streams else x
    if name == "d":  # streams that are new begin as the last one of before
        more = max(0, new.num_streams - old.num_streams)
        return mx.concatenate([x[: new.num_streams], mx.repeat(x[-1:], more, axis=0)])
    return x if new.condition_shared else mx.repeat(x, new.num_streams, axis=0)
