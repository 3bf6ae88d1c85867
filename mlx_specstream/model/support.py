"""Which architectures can do tree decoding and multi-stream attention through the seams."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE

from ..errors import UnsupportedModel
from .cache import make_prompt_cache
from .rows import tree_rows
from .seams import Pass, Seams

# Each has a parity test (tests/test_architectures.py): tree and streams against plain decoding.
_TESTED = """
    llama mistral qwen2 qwen2_moe qwen3 qwen3_moe mixtral phi phi3 gemma2 gemma3_text gpt_oss
    smollm3 olmo2 olmo3 olmoe cohere cohere2 stablelm starcoder2 granite glm4 exaone4 internlm2
    seed_oss opt gpt2 ministral3
"""
TESTED = frozenset(_TESTED.split())
# Why some cannot (yet); everything else is probed when it is loaded.
REFUSED = {
    "gemma4_text": "its layers share K/V and take per-layer inputs",
}
# Their own attention broadcasts one mask over the batch, so sequences of a batch cannot have different
# stream hosts; they train with batch size 1.
ONE_MASK = frozenset({"gemma2"})
TOLERANCE = 2e-2  # of the largest logit: wide enough for 16-bit weights, wrong positions give more


def check_supported(model: nn.Module) -> None:
    """Raise UnsupportedModel, with the reason, if ``model`` cannot have streams."""
    kind = getattr(model, "model_type", type(model).__name__)
    why = REFUSED.get(kind) or structural(model)
    if why is None and kind not in TESTED:
        why = _probe(model)
    if why is not None:
        raise UnsupportedModel(
            f"[streams] model_type '{kind}' cannot have streams: {why}; use it without streams."
        )


def structural(model: nn.Module) -> str | None:
    """Why ``model`` cannot have streams, where its layers alone tell; None where they do not."""
    layers = getattr(model, "layers", None)
    if not layers:
        return "it has no list of layers"
    caches = model.make_cache() if hasattr(model, "make_cache") else make_prompt_cache(model)
    others = sorted(
        {type(c).__name__ for c in caches if not isinstance(c, KVCache | RotatingKVCache)}
    )
    if others:
        return f"it has recurrent or hybrid layers ({', '.join(others)}), whose state cannot branch"
    if len(caches) != len(layers):
        return f"its {len(layers)} layers share {len(caches)} K/V caches"
    if any(isinstance(m, DynamicNTKScalingRoPE) for _, m in model.named_modules()):
        return "its rope (dynamic NTK) rejects a position per token"
    return None


def _probe(model: nn.Module) -> str | None:
    """The architecture's own word, on a tiny tree.

    Its two branches must equal plain decoding of each, and the last layer must give the same when
    it runs alone on the hidden states that entered it, as it does for streams.
    """
    prompt, branches = [1, 2, 3], (4, 5)
    try:
        seams = Seams(model)
        try:
            stores = [KVCache() for _ in model.layers]
            model(mx.array([prompt]), cache=stores)
            depth = np.array([0, 1, 1])
            sees = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=bool)
            seams.cut = seams.num_layers - 1
            run = Pass(tree_rows(len(prompt), depth, sees))
            tree = seams.forward(run, mx.array([[6, *branches]]), stores)[0]
            for context in run.contexts:
                context.drop()
            alone = Pass(run.rows, first=seams.cut, enters=run.cut_hidden)
            again = seams.forward(alone, stores=stores)[0]
            mx.eval(tree, again)
        finally:
            seams.detach()
        for node, token in enumerate(branches, 1):
            plain = model(mx.array([[*prompt, 6, token]]))[0, -1]
            for got, rule in (
                (tree, "its forward does not follow a position per token"),
                (again, "its upper layers need more than the hidden states below them"),
            ):
                worst = (mx.abs(plain - got[node]).max() / mx.abs(plain).max()).item()
                if not worst < TOLERANCE:
                    return f"{rule} (difference {worst:.1e})"
    except Exception as error:  # whatever an unknown forward does with objects it does not expect
        return f"its forward does not fit the seams ({type(error).__name__}: {str(error)[:120]})"
    return None
