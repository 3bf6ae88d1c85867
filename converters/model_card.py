"""The README.md of a converted model: where it is from and how it was made."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from mlx_specstream.config import StreamConfig
from mlx_specstream.model.architectures import OWN

LARGEST = 1 << 20  # bytes of a source's own card
# What a card of the source says about the weights that is still true of the result.
KEPT = ("license", "license_name", "license_link", "language", "datasets")
TEXT = """
# {title}

Converted {to} by [mlx-specstream](https://arxiv.org/abs/2402.11131) {versions}.

{facts}

{usage}
"""


class Kind(NamedTuple):
    """What a card is about: the form it was converted to, how it is used, and tags of the hub."""

    to: str
    usage: str
    tags: tuple[str, ...] = ()


WHERE = "by the path of this folder or by the id\nof its repository"
MODEL = Kind(
    "to MLX's format", f"It loads with `mlx_lm.load` and with `mlx_specstream.load`, {WHERE}."
)
OWN_MODEL = Kind(
    "to MLX's format",
    f"It loads with `mlx_specstream.load`, {WHERE}.\nmlx-lm itself lacks this architecture.",
)
ADAPTER = Kind(
    "to an adapter of mlx-lm",
    "It is no model: with its base, converted to MLX, it loads by\n"
    "`mlx_lm.load(base, adapter_path=...)`, or `mlx_specstream.load` with the same arguments.",
    ("lora",),
)
STREAMS = Kind(
    "to a streams folder",
    "They are no model: with their base, converted to MLX, they load by\n"
    "`mlx_specstream.load(base, streams=...)`.",
)


def kind_of_model(config: Mapping) -> Kind:
    return OWN_MODEL if config.get("model_type") in OWN else MODEL


def told(origin: str | Path) -> str:
    """A hub id, or the name of a file or folder: where that lies here is nobody's business."""
    return str(origin) if is_hub_id(origin) else Path(origin).expanduser().absolute().name


def is_hub_id(origin: str | Path) -> bool:
    """Whether something that is no path of this machine can be one of the hub."""
    path, text = Path(origin).expanduser(), str(origin)
    known = path.exists() or path.is_absolute() or text.startswith((".", "~"))
    return not known and text.count("/") <= 1


def model_card(
    title: str,
    origin: str | Path,
    source: Path,
    facts: Mapping[str, str],
    kind: Kind = MODEL,
    base: str | Path | None = None,
) -> str:
    """The text of a card.

    Args:
        origin: what was converted: a path, of which only the name is told, or a hub id.
        source: its folder; what its card says about licence and language is kept.
        facts: what was done, a line each.
        base: of an adapter or streams, a path or a hub id.
    """
    from huggingface_hub import ModelCardData

    name = told(origin)
    if source.parent.name == "snapshots":  # as the hub's client lays out what it brings
        name += f", commit {source.name}"
    facts = {"source": name, **({"base": told(base)} if base else {}), **facts}
    of = base if kind in (ADAPTER, STREAMS) else origin
    data = ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=["mlx", "mlx-specstream", *kind.tags],
        base_model=str(of) if of and is_hub_id(of) else None,
        ignore_metadata_errors=True,
        **kept_metadata(source / "README.md"),
    )
    names = ("mlx-specstream", "mlx", "mlx-lm")
    own, *others = [f"{name} {version(name)}" for name in names]
    text = TEXT.format(
        title=title,
        to=kind.to,
        versions=f"{own.split()[1]} ({', '.join(others)})",
        facts="\n".join(f"- {key}: {value}" for key, value in facts.items()),
        usage=kind.usage,
    )
    return f"---\n{data.to_yaml()}\n---\n{text}"


def what_was_done(config: Mapping, dtype: str | None, tensors: int, before: Mapping) -> dict:
    """Facts for a card, told from the config of the result.

    Args:
        before: the config of the source, as mlx-lm's loader returns it.
    """
    facts = {"architecture": str(config.get("model_type")), "parameter tensors": str(tensors)}
    if dtype:
        facts["type of the weights that are not quantised"] = dtype
    was, now = quantisation(before), quantisation(config)
    if now:
        facts["quantisation"] = now
    elif was:
        facts["weights dequantised from"] = was
    return facts


def streams_in_words(config: StreamConfig) -> str:
    return (
        f"{config.num_streams} streams over the top {config.msa_layers} layers, LoRA of rank "
        f"{config.lora_rank}"
    )


def quantisation(config: Mapping) -> str | None:
    settings = config.get("quantization")
    if not isinstance(settings, dict):
        return None
    plain = {k: v for k, v in settings.items() if not isinstance(v, dict)}
    mixed = len(settings) - len(plain)
    text = ", ".join(f"{key} {value}" for key, value in plain.items())
    return text + (f"; {mixed} tensors have settings of their own" if mixed else "")


def kept_metadata(path: Path) -> dict:
    """What to keep of the card of the source; nothing where it cannot be read."""
    from huggingface_hub import ModelCard

    try:
        if path.stat().st_size > LARGEST:
            return {}
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        found = {key: card.data.get(key) for key in KEPT}
    except Exception:  # a card is only ever a help, and YAML fails in many ways
        return {}
    return {key: value for key, value in found.items() if is_plain(value)}


def is_plain(value) -> bool:
    if isinstance(value, list):
        return 0 < len(value) <= 100 and all(isinstance(item, str) for item in value)
    return isinstance(value, str) and 0 < len(value) <= 1000
