"""The README.md of a converted model: where it is from and how it was made."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

LARGEST = 1 << 20  # bytes of a source's own card
# What a card of the source says about the weights that is still true of the result.
KEPT = ("license", "license_name", "license_link", "language", "datasets")
TEXT = """
# {title}

Converted to MLX's format by [mlx-specstream](https://arxiv.org/abs/2402.11131) {versions}.

{facts}

It loads with `mlx_lm.load` and with `mlx_specstream.load`, by the path of this folder or by the id
of its repository.
"""


def model_card(title: str, origin: str, source: Path, facts: Mapping[str, str]) -> str:
    """The text of a card.

    Args:
        origin: what was converted: a path, of which only the name is told, or a hub id.
        source: its folder; what its card says about licence and language is kept.
        facts: what was done, a line each.
    """
    from huggingface_hub import ModelCardData

    local = Path(origin).expanduser().exists()
    name, base = (source.name, None) if local else (origin, origin)
    if source.parent.name == "snapshots":  # as the hub's client lays out what it brings
        name += f", commit {source.name}"
    facts = {"source": name, **facts}
    tags = ["mlx", "mlx-specstream"]
    data = ModelCardData(
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=tags,
        base_model=base,
        ignore_metadata_errors=True,
        **kept_metadata(source / "README.md"),
    )
    names = ("mlx-specstream", "mlx", "mlx-lm")
    own, *others = [f"{name} {version(name)}" for name in names]
    text = TEXT.format(
        title=title,
        versions=f"{own.split()[1]} ({', '.join(others)})",
        facts="\n".join(f"- {key}: {value}" for key, value in facts.items()),
    )
    return f"---\n{data.to_yaml()}\n---\n{text}"


def what_was_done(config: Mapping, dtype: str | None, tensors: int) -> dict[str, str]:
    """Facts for a card, told from the config of the result."""
    facts = {"architecture": str(config.get("model_type")), "parameter tensors": str(tensors)}
    if dtype:
        facts["type of the weights that are not quantised"] = dtype
    if isinstance(quantization := config.get("quantization"), dict):
        plain = {k: v for k, v in quantization.items() if not isinstance(v, dict)}
        mixed = len(quantization) - len(plain)
        facts["quantisation"] = ", ".join(f"{key} {value}" for key, value in plain.items())
        facts["quantisation"] += f"; {mixed} tensors have settings of their own" if mixed else ""
    return facts


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
