"""How fast weights could be read here at best, and how many bytes of them a token needs."""

from __future__ import annotations

import re
import time

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..model.projections import embedding_of, weight_shape

ARRAYS = 4  # read in one go, so that launching and waiting weigh little
# Bytes of each array: far above the caches (an M Ultra has 96 MB), far below the smallest memory.
GPU_ARRAY, CPU_ARRAY = 1 << 28, 1 << 26

# Peaks in GB/s that the vendor states, not measured (shared/design/apple_silicon.md, 4b; where sources
# disagree, as a range).
VENDOR_PEAKS = {
    **{"M1": "68", "M1 Pro": "200", "M1 Max": "400", "M1 Ultra": "800"},
    **{"M2": "100", "M2 Pro": "200", "M2 Max": "400", "M2 Ultra": "800"},
    **{"M3": "100", "M3 Pro": "150", "M3 Max": "300-400", "M3 Ultra": "819"},
    **{"M4": "120", "M4 Pro": "273", "M4 Max": "410-546"},
    **{"M5": "153", "M5 Pro": "about 300", "M5 Max": "up to 614"},
}
# What the models of mlx-lm call the experts that a token visits.
EXPERTS_USED = (
    "num_experts_per_tok",
    "moe_topk",
    "num_experts_per_token",
    "moe_k",
    "top_k_experts",
)


def vendor_peak(chip: str) -> str | None:
    """GB/s as the vendor states them for a chip ("Apple M3 Max"), or None for an unknown one."""
    found = re.search(r"\bM\d+(?: (?:Pro|Max|Ultra))?\b", chip)
    return VENDOR_PEAKS.get(found.group()) if found and "Apple" in chip else None


def read_bandwidth(repeats: int = 5, array_bytes: int | None = None) -> dict:
    """Time reading large arrays: by a sum, and by a matrix times a vector, which is what decoding does.

    Returns:
        ``gb_s``: the faster of both at its best repeat; ``sum_gb_s`` and ``matvec_gb_s``: every
        repeat; ``bytes``: how many were read each time.
    """
    if array_bytes is None:
        array_bytes = GPU_ARRAY if mx.default_device() == mx.gpu else CPU_ARRAY
    width = 4096
    rows = max(1, array_bytes // (4 * width))
    arrays = [mx.full((rows, width), 0.5 + i) for i in range(ARRAYS)]
    vector = mx.ones((width,))
    mx.eval(arrays, vector)
    total = sum(a.nbytes for a in arrays)
    taken = {"sum": [], "matvec": []}
    for repeat in range(repeats + 1):  # the first warms up
        for name, read in (("sum", mx.sum), ("matvec", lambda a: a @ vector)):
            tic = time.perf_counter()
            mx.eval([read(a) for a in arrays])
            if repeat:
                taken[name].append(time.perf_counter() - tic)
    rates = {name: [total / t / 1e9 for t in times] for name, times in taken.items()}
    return {
        "gb_s": max(max(r) for r in rates.values()),
        "sum_gb_s": rates["sum"],
        "matvec_gb_s": rates["matvec"],
        "bytes": total,
    }


def best_of(one: dict, other: dict) -> dict:
    """Two measurements as one."""
    lists = {name: one[name] + other[name] for name in ("sum_gb_s", "matvec_gb_s")}
    return {**lists, "gb_s": max(one["gb_s"], other["gb_s"]), "bytes": one["bytes"]}


def weight_bytes(model: nn.Module) -> dict:
    """Bytes of a model's weights: ``all`` of them, and those that one token's pass reads.

    A token reads one row of the embedding (all of it where it is the head too) and, of experts,
    those it is sent to.
    """
    total = sum(v.nbytes for _, v in tree_flatten(model.parameters()))
    unread = 0.0
    embedding = embedding_of(model)
    tied = True
    args = getattr(model, "args", None)
    used = next((getattr(args, n) for n in EXPERTS_USED if getattr(args, n, None)), None)
    for _, module in model.named_modules():
        if module is embedding or not isinstance(module.get("weight"), mx.array):
            continue
        shape = weight_shape(module)
        own = sum(v.nbytes for v in module.values() if isinstance(v, mx.array))
        if "Switch" in type(module).__name__ and used:  # mlx-lm's experts: [experts, out, in]
            unread += own * (1 - min(1.0, used / shape[0]))
        elif len(shape) == 2 and shape[0] == weight_shape(embedding)[0]:
            tied = False
    if not tied:
        unread += sum(v.nbytes for v in embedding.values() if isinstance(v, mx.array))
    return {"all": total, "per_token": round(total - unread)}
