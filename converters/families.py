"""What files of some families hold that mlx-lm's class does not expect under that name or shape.

transformers 5 keeps the experts of a layer in one tensor while it runs, and splits it when it saves:
a plain `torch.save(model.state_dict())` has the tensor whole.
"""

import re
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_specstream.errors import BadCheckpoint

# Prefix of the language model that mlx-lm's class does without.
PREFIX = {"gpt2": "transformer."}
BUFFERS = {"gpt2": (".attn.bias", ".attn.masked_bias")}  # causal masks of old checkpoints
EXPERTS = re.compile(r"(.+\.)mlp\.experts\.(gate_up_proj|down_proj)")
ROUTER = re.compile(r"(.+\.)mlp\.gate\.(.+)")
# Families that transformers saves with a tensor per expert: where these are, and what they are called.
PLAIN = ("mlp", "gate_proj", "up_proj", "down_proj")
SPLIT = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe"), PLAIN),
}


class Part(NamedTuple):
    """A tensor as the class wants it, cut out of one of a file.

    Args:
        name: its name.
        expert, of_experts: which expert's, of how many; None: the whole tensor.
        half: which half of the rows: 0 for gate, 1 for up; None: all.
        turned: rows and columns change places.
    """

    name: str
    expert: int | None = None
    of_experts: int = 0
    half: int | None = None
    turned: bool = False

    def of(self, value: mx.array) -> mx.array:
        if self.turned and value.ndim < 2:
            raise BadCheckpoint(
                f"{self.name!r} has the shape {list(value.shape)}; it needs two axes"
            )
        if self.expert is not None:  # [experts, rows, columns], where gate lies above up
            odd = value.ndim == 3 and self.half is not None and value.shape[1] % 2
            if value.ndim != 3 or value.shape[0] != self.of_experts or odd:
                raise BadCheckpoint(
                    f"the experts of {self.name!r} have the shape {list(value.shape)}; config.json "
                    f"says {self.of_experts} experts"
                )
            value = value[self.expert]
        if self.half is not None:
            value = mx.split(value, 2, axis=0)[self.half]
        return mx.swapaxes(value, -1, -2) if self.turned else value


def parts_of(name: str, config: dict[str, Any]) -> list[Part]:
    """What becomes of one tensor of a file; an empty list for a buffer.

    Args:
        config: as transformers sees it.
    """
    family = config.get("model_type")
    if name.endswith(BUFFERS.get(family, ())):
        return []
    found = EXPERTS.fullmatch(name)
    if (
        found and family == "gpt_oss"
    ):  # [experts, columns, rows], of which mlx-lm wants the transpose
        return [Part(f"{name}.weight", turned=True)]
    if family not in SPLIT:
        return [Part(name)]
    place, gate, up, down = SPLIT[family]
    if found:
        count = config.get("num_local_experts") or config.get("num_experts") or 0
        halves = ((gate, 0), (up, 1)) if found[2] == "gate_up_proj" else ((down, None),)
        return [
            Part(f"{found[1]}{place}.experts.{i}.{own}.weight", i, count, half)
            for i in range(count)
            for own, half in halves
        ]
    router = ROUTER.fullmatch(name)
    return [Part(f"{router[1]}{place}.gate.{router[2]}" if router else name)]
