"""What files of some families hold that mlx-lm's class does not expect under that name or shape.

transformers 5 keeps the experts of a layer in one tensor while it runs, and splits it when it saves:
a plain `torch.save(model.state_dict())` has the tensor whole.
"""

import re
from typing import NamedTuple

import mlx.core as mx

# Prefix of the language model that mlx-lm's class does without.
PREFIX = {"gpt2": "transformer."}
BUFFERS = {"gpt2": (".attn.bias", ".attn.masked_bias")}  # causal masks of old checkpoints
EXPERTS = re.compile(r"(.+\.)mlp\.experts\.(gate_up_proj|down_proj)")
ROUTER = re.compile(r"(.+\.)mlp\.gate\.(.+)")
SWITCH = {
    "mixtral": "block_sparse_moe.switch_mlp",
    "qwen2_moe": "mlp.switch_mlp",
    "qwen3_moe": "mlp.switch_mlp",
    "olmoe": "mlp.switch_mlp",
}


class Part(NamedTuple):
    """A tensor as the class wants it: its name, and which half of the rows (None: all), turned or not."""

    name: str
    half: int | None = None
    turned: bool = False

    def of(self, value: mx.array) -> mx.array:
        if self.half is not None:  # [experts, 2 rows, columns]: gate above up
            value = mx.split(value, 2, axis=1)[1 - self.half]
        return mx.swapaxes(value, -1, -2) if self.turned else value


def parts_of(name: str, family: str | None) -> list[Part]:
    """What becomes of one tensor of a file; an empty list for a buffer."""
    if name.endswith(BUFFERS.get(family, ())):
        return []
    found = EXPERTS.fullmatch(name)
    if (
        found and family == "gpt_oss"
    ):  # [experts, columns, rows], of which mlx-lm wants the transpose
        return [Part(f"{name}.weight", turned=True)]
    if family not in SWITCH:
        return [Part(name)]
    if found and found[2] == "down_proj":
        return [Part(f"{found[1]}{SWITCH[family]}.down_proj.weight")]
    if found:
        place = f"{found[1]}{SWITCH[family]}"
        return [Part(f"{place}.gate_proj.weight", 0), Part(f"{place}.up_proj.weight", 1)]
    router = ROUTER.fullmatch(name) if family == "mixtral" else None
    return [Part(f"{router[1]}block_sparse_moe.gate.{router[2]}" if router else name)]
