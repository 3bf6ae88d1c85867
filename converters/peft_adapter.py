"""PEFT adapters (LoRA, rsLoRA, DoRA): read, and merged into the weights of their base.

    LoRA   W + s B A                              arXiv 2106.09685; s = alpha / r
    rsLoRA the same with s = alpha / sqrt(r)      arXiv 2312.03732
    DoRA   m (W + s B A) / |W + s B A|            arXiv 2402.09353; the norm of each output's row

Merged in float32 and rounded once, whatever the base's precision.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from math import factorial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_specstream.errors import BadCheckpoint, UnsupportedModel

from .families import PREFIX as FAMILY_PREFIX
from .weight_file import read_tensors
from .weights import read_json

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
LARGEST_ALPHA = 1e30  # in a float32
PREFIX = "base_model.model."  # what PEFT puts before the names of the model that it wraps
# Settings that change what the tensors mean, and that are not handled: they must be off.
UNHANDLED = (
    "target_parameters",
    "layer_replication",
    "use_qalora",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_bdlora",
)
PART = re.compile(
    r"(?P<module>.+)\."
    r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?P<leaf>\.weight|\.bias)?"
)
# What makes a pattern slow: a repeated group can take exponential time, each repetition multiplies.
REPEATED, REPETITION = re.compile(r"\)[*+?{]"), re.compile(r"[*+?{]")
MOST_STEPS = 100_000_000  # of matching patterns with names: a second or two
# Ways to begin a training that change the base itself: these adapters belong to what was left of it.
NEW_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
KINDS = {"lora_A": "a", "lora_embedding_A": "a", "lora_B": "b", "lora_embedding_B": "b"}


@dataclass
class Update:
    """What an adapter does to one weight.

    Args:
        a, b: [r, d_in] and [d_out, r]; for an embedding d_in counts tokens.
        bias: of B, [d_out], or None.
        magnitude: DoRA's m, or None.
        embedding: of tokens; its weight is [tokens, width], the transpose of b a.
    """

    a: mx.array | None = None
    b: mx.array | None = None
    bias: mx.array | None = None
    magnitude: mx.array | None = None
    embedding: bool = False
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def fault(self) -> str | None:
        """What is wrong with its shapes, if anything is."""
        a, b = self.a, self.b
        if a is None or b is None:
            return "is incomplete"
        if a.ndim != 2 or b.ndim != 2 or 0 in (a.size, b.size) or a.shape[0] != b.shape[1]:
            return f"has two ranks or none: {list(a.shape)} and {list(b.shape)}"
        for name, vector in (("magnitude", self.magnitude), ("bias", self.bias)):
            if vector is not None and vector.size != b.shape[0]:
                return f"has a {name} of {vector.size} for {b.shape[0]} outputs"
        return None

    def merged(self, weight: mx.array, turned: bool) -> mx.array:
        """The weight with the update in it; `turned` weights are [d_in, d_out]."""
        wide, a, b = (value.astype(mx.float32) for value in (weight, self.a, self.b))
        wide = (wide.T if turned else wide) + (b @ a) * self.scale  # [d_out, d_in]
        if self.magnitude is not None:
            norm = mx.sqrt((wide * wide).sum(axis=1, keepdims=True))
            wide = wide * (self.magnitude.astype(mx.float32).reshape(-1, 1) / norm)
        return (wide.T if turned else wide).astype(weight.dtype)


@dataclass
class PeftAdapter:
    """An adapter folder: updates by the name of the module, and tensors that replace the base's."""

    folder: Path
    settings: dict
    updates: dict[str, Update]
    replaced: dict[str, mx.array]
    used: set[str] = field(default_factory=set)

    def apply(self, name: str, value: mx.array) -> mx.array:
        """A tensor of the base, changed if the adapter has something for it."""
        if name in self.replaced:  # an embedding may be replaced, and have its LoRA besides
            self.used.add(name)
            value = self.replaced[name].astype(value.dtype)
        module, _, leaf = name.rpartition(".")
        update = self.updates.get(module)
        if update is None or (leaf == "bias" and update.bias is None):
            return value
        self.used.add(f"{module}.{leaf}")
        if leaf == "bias":
            more = update.scale * update.bias.astype(mx.float32)
            return (value.astype(mx.float32) + more).astype(value.dtype)
        if leaf != "weight" or not mx.issubdtype(value.dtype, mx.floating):
            raise BadCheckpoint(
                f"{self.folder}: the base's {name!r} is quantised ({value.dtype}); convert it with "
                "--dequantize first, then merge"
            )
        # The linear layers of gpt2 lie on their side, and so does every embedding.
        turned = update.embedding or bool(self.settings.get("fan_in_fan_out"))
        want = (update.b.shape[0], update.a.shape[1])
        want = want[::-1] if turned else want
        if tuple(value.shape) != want:
            raise BadCheckpoint(
                f"{self.folder}: the adapter is for a {module!r} of {list(want)}, but the base's is "
                f"{list(value.shape)}; it belongs to another base"
            )
        return update.merged(value, turned)

    def changes(self, name: str) -> bool:
        return name in self.replaced or name.rpartition(".")[0] in self.updates

    def forget(self, name: str) -> None:
        """Change nothing about a tensor of the base."""
        self.replaced.pop(name, None)
        self.updates.pop(name.rpartition(".")[0], None)

    def check_used(self) -> None:
        """Raise BadCheckpoint for a part of the adapter that met nothing in the base."""
        wanted = {f"{module}.weight" for module in self.updates} | self.replaced.keys()
        wanted |= {f"{module}.bias" for module, u in self.updates.items() if u.bias is not None}
        left = sorted(wanted - self.used)
        if left:
            raise BadCheckpoint(
                f"{self.folder}: {len(left)} of {len(wanted)} changes have no tensor in the base "
                f"({left[0]!r}); the adapter belongs to another base"
            )


def is_peft(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and "peft_type" in read_json(folder / CONFIG)


def read_peft(folder: Path, family: str | None) -> PeftAdapter:
    """An adapter as PEFT's `save_pretrained` writes it.

    Args:
        family: the base's model type, for the names of its tensors.

    Raises: UnsupportedModel for other methods than LoRA and its kin; BadCheckpoint for damage.
    """
    settings = read_json(folder / CONFIG)
    if settings.get("peft_type") != "LORA":
        raise UnsupportedModel(
            f"{folder}: 'peft_type' must be LORA but is {settings.get('peft_type')!r}; merge it with "
            "PEFT's merge_and_unload() first"
        )
    begin = str(settings.get("init_lora_weights")).lower()
    if begin.startswith(NEW_BASE):
        raise UnsupportedModel(
            f"{folder}: 'init_lora_weights' is {begin[:20]!r}, which changed the base before training; "
            "merge it with PEFT's merge_and_unload(), or save it with "
            "path_initial_model_for_weight_conversion"
        )
    for key in UNHANDLED:
        if settings.get(key):
            raise UnsupportedModel(
                f"{folder}: {key!r} is {str(settings[key])[:60]!r}, which is not handled; merge it "
                "with PEFT's merge_and_unload() first"
            )
    updates, replaced, inner = {}, {}, FAMILY_PREFIX.get(family, "")
    for name, value in weights_of(folder).items():
        clean = name.removeprefix(PREFIX).removeprefix(inner)
        found = PART.fullmatch(clean)
        if found is None:
            replaced[clean.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = value
            continue
        update = updates.setdefault(found["module"], Update())
        kind = KINDS.get(found["part"], "magnitude")
        if found["leaf"] == ".bias":
            kind = "bias"
        update.embedding |= "embedding" in found["part"]
        setattr(update, kind, value)
    alphas = alpha_patterns(settings, updates)
    for module, update in updates.items():
        if why := update.fault():
            raise BadCheckpoint(f"{folder}: the LoRA of {module!r} {why}")
        # PEFT's patterns are for the names that it saw, with the prefix of the family.
        update.scale = scale_of(settings, alphas, inner + module, update.rank)
    if not updates and not replaced:
        raise BadCheckpoint(f"{folder}: the adapter holds no tensors")
    return PeftAdapter(folder, settings, updates, replaced)


def weights_of(folder: Path) -> dict[str, mx.array]:
    for path in (folder / name for name in WEIGHTS):
        if path.is_file():
            return read_tensors(path)
    raise BadCheckpoint(f"{folder}: the adapter has no {' or '.join(WEIGHTS)}")


def alpha_patterns(settings: dict, modules: Collection[str]) -> dict[re.Pattern, Any]:
    """Patterns of names whose modules have an alpha of their own, as PEFT matches them.

    Raises: BadCheckpoint for one that is broken, or would take for ever.
    """
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise BadCheckpoint(f"{CONFIG}: 'alpha_pattern' must map names to numbers")
    found, steps = {}, 0
    for key, alpha in patterns.items():
        power = len(REPETITION.findall(key)) + 2
        steps += 1000 * (10 + len(key))  # to understand it
        steps += sum(len(name) ** power // factorial(power) for name in modules)
        if REPEATED.search(key) or steps > MOST_STEPS:
            raise BadCheckpoint(f"{CONFIG}: 'alpha_pattern' has keys that could match for ever")
        try:
            found[re.compile(rf"(.*\.)?({key})$")] = alpha
        except re.error as error:
            raise BadCheckpoint(
                f"{CONFIG}: 'alpha_pattern' has a broken key {key!r} ({error})"
            ) from None
    return found


def scale_of(settings: dict, alphas: dict[re.Pattern, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r); the first pattern that names the module gives its alpha."""
    own = (alpha for pattern, alpha in alphas.items() if pattern.match(module))
    alpha = next(own, settings.get("lora_alpha"))
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not number or not abs(alpha) < LARGEST_ALPHA:  # NaN is no number either
        raise BadCheckpoint(f"{CONFIG}: 'lora_alpha' must be a number but is {alpha!r}")
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)
