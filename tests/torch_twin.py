"""The streams of ``examples/pytorch`` with random weights, for the tests of the converters.

There is one twin in PyTorch, the example that people train with. The golden files in ``golden_sources``
were made by an older one, written apart from it row by row.
"""

import sys
from pathlib import Path

import torch

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/pytorch"
sys.path.insert(0, str(EXAMPLE))

from streaming import PROJECTIONS, StreamConfig, StreamingModel, Streams  # noqa: E402

FULL = {  # every part of streams at once, but for the value rotation, which has no embeddings
    **{"num_streams": 3, "msa_layers": 2, "lora_rank": 4, "lora_alpha": 6.0},
    **{"lora_targets": list(PROJECTIONS), "main_sees_streams": False, "stream_position": "t+j"},
    **{"init_rank": 5, "value_rotation": 0.0, "prune_rank": 6, "condition_rank": 7},
}
VARIANTS = {
    "every part": {},
    "plain": {"init_rank": 0, "prune_rank": 0, "condition_rank": 0},
    "shared": {"main_sees_streams": True, "condition_rank": 0},
    "root": {"root_rank": 9, "condition_rank": 0, "init_rank": 0},
    "one condition": {"root_rank": 9, "condition_shared": True},
    "value rotation": {"value_rotation": 0.03, "stream_position": "t", "init_rank": 0},
    "few targets": {"lora_targets": ["v_proj", "up_proj"], "num_streams": 2, "msa_layers": 1},
}


def random_streams(model, config: dict, seed: int = 11) -> dict:
    """Stream tensors under their PyTorch names, none of them zero."""
    torch.manual_seed(seed)
    names = Streams(model, StreamConfig(**config)).state_dict()
    return {name: 0.3 * torch.randn_like(value) for name, value in names.items()}


@torch.no_grad()
def twin(model, tensors: dict, config: dict, tokens: list[int]) -> dict:
    """Logits: `main` [L, V], `streams` [g, L, V], and where there are such parts `exit` [L, V] (the
    early exit at the cut) and `conditioned` [g, L, V] (token t + j stands before stream j's guess)."""
    streams = Streams(model, StreamConfig(**config))
    streams.load_state_dict(tensors)
    return logits_of(StreamingModel(model, streams), tokens)


@torch.no_grad()
def logits_of(model: StreamingModel, tokens: list[int]) -> dict:
    """The same of a model that has its streams; at the text's end its beginning stands before a guess."""
    L, g = len(tokens), model.config.num_streams
    states = model.inline(torch.tensor([tokens]))
    found = {"main": model.head(states.main)[0], "streams": model.head(states.streams)[0]}
    if model.config.prune_rank:
        found["exit"] = model.head(states.cut + model.streams.early_exit(states.cut))[0]
    if model.config.condition_rank:
        ids = [tokens[(t + j) % L] for j in range(1, g + 1) for t in range(L)]
        before = model.inner.embed_tokens(torch.tensor(ids)).unflatten(0, (1, g, L))
        found["conditioned"] = model.head(model.streams.condition(states.streams, before))[0]
    return found
