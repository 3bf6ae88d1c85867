"""PEFT adapters (LoRA, rsLoRA, DoRA): read, and merged into the weights of their base.

    LoRA   W + s B A                              arXiv 2106.09685; s = alpha / r
    rsLoRA the same with s = alpha / sqrt(r)      arXiv 2312.03732
    DoRA   m (W + s B A) / |W + s B A|            arXiv 2402.09353; the norm of each output's row

Merged in float32 and rounded once, whatever the base's precision.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from mlx_specstream.errors import BadCheckpoint, UnsupportedModel

from .families import PREFIX as FAMILY_PREFIX
from .safetensors_header import check_safetensors
from .torch_pickle import load_torch
from .weights import read_json

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
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
# A few of these are what names need; many, or a repeated group, can take exponential time.
ENDLESS, REPEATED = re.compile(r"[*+?|]"), re.compile(r"\)[*+?{]")
KINDS = {"lora_A": "a", "lora_embedding_A": "a", "lora_B": "b", "lora_embedding_B": "b"}


@dataclass
class Update:
    """What an adapter does to one weight.

    Args:
        a, b: [r, d_in] and [d_out, r]; for an embedding d_in counts tokens.
        bias: of B, [d_out], or None.
        magnitude: DoRA's m, or None.
        embedding: the weight is [tokens, width], the transpose of what b a would be.
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
        rows = a.shape[1] if self.embedding else b.shape[0]
        for name, vector in (("magnitude", self.magnitude), ("bias", self.bias)):
            if vector is not None and vector.size != rows:
                return f"has a {name} of {vector.size} for {rows} rows"
        return None

    def delta(self) -> mx.array:
        """s B A in float32, as the weight lies."""
        a, b = self.a.astype(mx.float32), self.b.astype(mx.float32)
        change = (b @ a) * self.scale
        return change.T if self.embedding else change

    def merged(self, weight: mx.array, transposed: bool) -> mx.array:
        """The weight with the update in it; `transposed` weights are [d_in, d_out] (gpt2)."""
        wide = weight.astype(mx.float32)
        wide = (wide.T if transposed else wide) + self.delta()
        if self.magnitude is not None:
            norm = mx.sqrt((wide * wide).sum(axis=1, keepdims=True))
            wide = wide * (self.magnitude.astype(mx.float32).reshape(-1, 1) / norm)
        return (wide.T if transposed else wide).astype(weight.dtype)


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
        transposed = bool(self.settings.get("fan_in_fan_out")) and not update.embedding
        have = value.shape[::-1] if transposed else value.shape
        want = (update.b.shape[0], update.a.shape[1])
        want = want[::-1] if update.embedding else want
        if tuple(have) != want:
            raise BadCheckpoint(
                f"{self.folder}: the adapter is for a {module!r} of {list(want)}, but the base's is "
                f"{list(have)}; it belongs to another base"
            )
        return update.merged(value, transposed)

    def changes(self, name: str) -> bool:
        return name in self.replaced or name.rpartition(".")[0] in self.updates

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
    for key in UNHANDLED:
        if settings.get(key):
            raise UnsupportedModel(
                f"{folder}: {key!r} is {str(settings[key])[:60]!r}, which is not handled; merge it "
                "with PEFT's merge_and_unload() first"
            )
    updates, replaced = {}, {}
    for name, value in read_tensors(folder).items():
        clean = name.removeprefix(PREFIX).removeprefix(FAMILY_PREFIX.get(family) or "\0")
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
    for module, update in updates.items():
        if why := update.fault():
            raise BadCheckpoint(f"{folder}: the LoRA of {module!r} {why}")
        update.scale = scale_of(settings, module, update.rank)
    if not updates and not replaced:
        raise BadCheckpoint(f"{folder}: the adapter holds no tensors")
    return PeftAdapter(folder, settings, updates, replaced)


def read_tensors(folder: Path) -> dict[str, mx.array]:
    for name in WEIGHTS:
        path = folder / name
        if path.is_file():
            if path.suffix == ".bin":
                return load_torch(path)
            check_safetensors(path)
            return mx.load(str(path))
    raise BadCheckpoint(f"{folder}: the adapter has no {' or '.join(WEIGHTS)}")


def scale_of(settings: dict, module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r); a module may have an alpha of its own."""
    alpha, patterns = settings.get("lora_alpha"), settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise BadCheckpoint(f"{CONFIG}: 'alpha_pattern' must map names to numbers")
    for key, value in patterns.items():
        if matches(key, module):
            alpha = value
            break
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise BadCheckpoint(f"{CONFIG}: 'lora_alpha' must be a number but is {alpha!r}")
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def matches(key: str, module: str) -> bool:
    """Whether a pattern of PEFT names a module: its whole name, or the end of it behind a dot."""
    if len(ENDLESS.findall(key)) > 3 or REPEATED.search(key):
        raise BadCheckpoint(f"{CONFIG}: 'alpha_pattern' has a key that could match for ever")
    try:
        return re.match(rf"(.*\.)?({key})$", module) is not None
    except re.error as error:
        raise BadCheckpoint(
            f"{CONFIG}: 'alpha_pattern' has a broken key {key!r} ({error})"
        ) from None
