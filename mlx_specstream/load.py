"""Load a model of mlx-lm, its tokenizer and its streams; every failure is one clear line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import load_adapters, load_model, load_tokenizer

from .errors import BadCheckpoint, UnsupportedModel
from .hub import resolve
from .model.architectures import model_classes
from .model.checkpoint import find_streams, load_streams
from .model.seams import attach
from .model.support import check_supported

# As mlx-lm's, and the streams. Code comes along only where it may run.
HUB_FILES = [
    "*.json",
    "model*.safetensors",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "*.jinja",
    "streams.safetensors",
    "streams/*",
]


def load(
    path_or_hf_repo: str | Path,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | Path | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    streams: str | Path | bool | None = None,
    force: bool = False,
):
    """Load a model, its tokenizer and its streams: ``mlx_lm.load`` with streams.

    Args:
        path_or_hf_repo: a model folder in mlx-lm's layout, or a hub id.
        streams: a streams folder. None looks inside the model folder; without any the model
            decodes plainly. False does not even look.
        force: take streams that were trained on another base (lossless ones: slower, same text).
        Others as in ``mlx_lm.load``.

    Returns:
        (model, tokenizer), or (model, tokenizer, config) with ``return_config``.

    Raises:
        BadCheckpoint: a folder is missing, damaged or not a model.
        UnsupportedModel: mlx-lm lacks the architecture, or it cannot have streams.
        StreamsMismatch: the streams belong to another base.
    """
    folder = model_folder(path_or_hf_repo, revision, trust_remote_code)
    model, tokenizer, config = load_base(
        folder,
        tokenizer_config,
        model_config,
        adapter_path,
        lazy,
        trust_remote_code,
    )
    if streams is False:
        found = None
    elif streams is None or streams is True:
        found = find_streams(folder)
    else:
        found = Path(streams)
    if found is not None:
        check_supported(model)
        parameters, note = load_streams(found, model, force)
        attach(model, parameters)
        if note:
            print(f"mlx-specstream: note: {note}", file=sys.stderr)
    return (model, tokenizer, config) if return_config else (model, tokenizer)


def load_base(
    folder: Path,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | Path | None = None,
    lazy: bool = False,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The stock model, tokenizer and config of a folder. Raises as ``load``."""
    config = _read_config(folder)
    if not list(folder.glob("model*.safetensors")):
        raise BadCheckpoint(
            f"[load] {folder} has no model*.safetensors; a Hugging Face folder with other weights "
            "is converted with mlx-specstream convert."
        )
    _warn_rope(config, folder)
    try:
        model, config = load_model(
            folder,
            lazy,
            model_config=model_config,
            get_model_classes=model_classes,
            trust_remote_code=trust_remote_code,
        )
    except (
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
        FileNotFoundError,
    ) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        if "not supported" in line or "custom module" in line:
            raise UnsupportedModel(f"[load] {folder}: {line}") from None
        raise BadCheckpoint(f"[load] {folder} cannot be loaded: {line[:400]}") from None
    if adapter_path is not None:
        adapter = Path(adapter_path)
        for name in ("adapter_config.json", "adapters.safetensors"):
            if not (adapter / name).is_file():
                raise BadCheckpoint(f"[load] adapter_path {adapter} has no {name}.")
        try:
            model = load_adapters(model, str(adapter))
        except Exception as error:  # damaged JSON, missing keys, truncated weights ...
            line = " ".join(str(error).split())
            raise BadCheckpoint(
                f"[load] adapter_path {adapter} cannot be loaded: {line[:300]}"
            ) from None
        model.eval()
    try:
        tokenizer = load_tokenizer(
            folder,
            {"trust_remote_code": trust_remote_code, **(tokenizer_config or {})},
            eos_token_ids=config.get("eos_token_id"),
        )
    except Exception as error:  # tokenizers raise bare Exceptions on damaged files
        line = " ".join(str(error).split())
        raise BadCheckpoint(
            f"[load] the tokenizer of {folder} cannot be loaded: {line[:400]}"
        ) from None
    return model, tokenizer, config


def model_folder(
    path_or_hf_repo: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> Path:
    """A local folder, or the local copy of a hub repository (downloaded if need be)."""

    def download(name: str) -> str:
        from huggingface_hub import snapshot_download

        patterns = [*HUB_FILES, "*.py"] if trust_remote_code else HUB_FILES
        return snapshot_download(name, revision=revision, allow_patterns=patterns)

    return resolve(path_or_hf_repo, download)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise BadCheckpoint(f"[load] {folder} is not a model: it has no config.json.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["model_type"] + ""
    except (ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint(f"[load] {path} is not a model's config: {error!r}.") from None
    return config


def _warn_rope(config: dict[str, Any], folder: Path) -> None:
    """mlx-lm ignores ``rope_parameters`` of most models: say so where that changes the text."""
    rope = config.get("rope_parameters") or {}
    plain = {"rope_theta": (None, 10000, 10000.0), "rope_type": (None, "default")}
    written_back = "rope_theta" in config or "rope_scaling" in config
    if not written_back and any(v not in plain.get(k, (None,)) for k, v in rope.items()):
        print(
            f"mlx-specstream: note: {folder} keeps its rope settings in rope_parameters, which mlx-lm "
            "does not read for most models; convert it with mlx-specstream convert.",
            file=sys.stderr,
        )
