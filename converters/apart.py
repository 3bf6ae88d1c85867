"""Sources that are no whole model: adapters and streams by themselves, and what needs no conversion."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_specstream.errors import BadArgument, BadCheckpoint, UnsupportedModel
from mlx_specstream.model.architectures import model_classes
from mlx_specstream.model.checkpoint import read_description

from .dry_run import describe_files
from .folder import check_folder
from .formats import locate, open_checkpoint, own_name
from .head import HEAD, TIED, embedding_in
from .mlx_adapter import fuse_adapter, is_mlx_adapter, write_mlx_adapter
from .model_card import ADAPTER, STREAMS, model_card, streams_in_words
from .new_folder import new_folder, scratch_folder
from .peft_adapter import CONFIG as ADAPTER_CONFIG
from .peft_adapter import PeftAdapter, is_peft, read_peft
from .plausible import check_layers
from .safetensors_header import read_header
from .source import find_adapter
from .staging import staged_model
from .torch_streams import BESIDE, FILE, TorchStreams, write_streams
from .weight_file import is_weights, look_into, read_tensors
from .weights import has_weights, read_json

Log = Callable[[str], None]


def is_apart(path: Path) -> bool:
    """Whether a source is an adapter or streams, without their base."""
    return is_adapter(path) or streams_file(path) is not None


def convert_apart(
    origin: str | Path,
    path: Path,
    target: Path,
    base: str | Path | None,
    changes: dict[str, Any],
    log: Log,
    plan: Log | None,
) -> Path | None:
    """An adapter or streams to a folder of their own.

    Args:
        origin: the path or hub id that was given, for the card of the result.
        path: where that lies here.
        changes: what was asked for that only a whole model can have.
        plan: for a dry run, takes a line for each tensor; nothing is kept.

    Returns: the new folder, or the source where nothing is to be done; None for a dry run.
    """
    for name, value in changes.items():
        if value:
            raise BadArgument(
                f"{path} is an adapter or streams without a model, and {name!r} is for a model; give it "
                "where you convert that"
            )
    if is_mlx_adapter(path):
        log(f"note: {path} is an adapter of mlx-lm already; nothing to convert")
        return path
    with new_folder(target) if plan is None else scratch_folder() as folder:
        if is_adapter(path):
            kind, base = ADAPTER, convert_adapter(path, folder, base, log)
            facts = adapter_facts(folder)
        else:
            kind = STREAMS
            convert_streams(streams_file(path), folder, base)
            facts = streams_facts(folder)
        for line in describe_files(folder, path) if plan else ():
            plan(line)
        card = model_card(target.name, origin, path, facts, kind, base)
        (folder / "README.md").write_text(card, encoding="utf-8")
    if plan is None:
        log(f"wrote {target}")
    return target if plan is None else None


def streams_file(path: Path) -> Path | None:
    """The file of a source that holds streams and nothing else."""
    if path.is_dir() and not (path / "config.json").is_file() and (path / FILE).is_file():
        check_folder(path)
        path = path / FILE
    if path.is_file() and is_weights(path):
        names = look_into(path).tensors
        return path if names and all(map(own_name, names)) else None
    return None


def convert_streams(path: Path, folder: Path, base: str | Path | None) -> None:
    """Streams alone to a streams folder. Raises: BadArgument where nobody says whose they are."""
    values = look_into(path).values
    source = TorchStreams(
        {own_name(name): value for name, value in read_tensors(path).items()},
        *map(values.get, BESIDE),
    )
    if base is not None:
        with scratch_folder() as room, staged_model(open_checkpoint(locate(base)), room) as model:
            write_streams(source, model, folder)
    elif source.base is not None:
        write_streams(source, None, folder)
    else:
        raise BadArgument(
            f"{path} does not say which base its streams belong to: give the base with --base"
        )


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter; some programs put the base's config.json beside it."""
    return (path / ADAPTER_CONFIG).is_file() and not has_weights(path)


def convert_adapter(
    path: Path, folder: Path, base: str | Path | None, log: Log
) -> str | Path | None:
    """A PEFT adapter to an adapter folder of mlx-lm, apart from its base, which tells whether it fits.

    Returns: the base, given or named by the adapter; None where nobody says.
    """
    check_folder(path)
    named = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    named = named if isinstance(named, str) and named else None
    if base is None and named and (Path(named) / "config.json").is_file():
        base = named
    if base is None:
        log("note: the base is not here, so names were taken as they are; --base checks them")
        write_mlx_adapter(read_peft(path, None), folder, None)
        return named
    checkpoint = open_checkpoint(locate(base))
    family = checkpoint.config.get("model_type")
    adapter = read_peft(path, family)
    embedding = embedding_in(checkpoint.names.values()) if checkpoint.view.get(TIED) else None
    if embedding and (adapter.changes(HEAD) or adapter.changes(embedding)):
        raise UnsupportedModel(
            f"{path}: the adapter changes the head or the embedding, which are one tensor in the base, "
            "and mlx-lm's adapters cannot part them; merge it into its base with --adapter"
        )
    write_mlx_adapter(adapter, folder, family)
    with scratch_folder() as room, staged_model(checkpoint, room) as model:
        fuse_adapter(model, folder)  # lazily: nothing is computed
    return base


def adapter_facts(folder: Path) -> dict[str, str]:
    """What a card says of an adapter of mlx-lm."""
    about = read_json(folder / ADAPTER_CONFIG)
    parameters = about["lora_parameters"]
    return {
        "kind": {"dora": "DoRA"}.get(about["fine_tune_type"], "LoRA"),
        "rank": f"{parameters['rank']}; the scales of PEFT are part of lora_b",
        "layers that it changes": ", ".join(parameters["keys"]),
    }


def streams_facts(folder: Path) -> dict[str, str]:
    """What a card says of streams."""
    description = read_description(folder)
    base, training = description["base"], description.get("training")
    facts = {"streams": streams_in_words(description["config"])}
    facts["they belong to"] = f"a {base.get('model_type')!r} of {base.get('num_layers')} layers"
    if isinstance(training, dict) and isinstance(training.get("steps"), int):
        facts["training"] = f"{training['steps']} steps"
    return facts


def open_adapter(path: str | Path, config: dict) -> PeftAdapter | Path:
    """An adapter to merge into the model of a config: one of PEFT, or the folder of mlx-lm's."""
    folder = find_adapter(path)
    check_folder(folder)
    if is_peft(folder):
        return read_peft(folder, config.get("model_type"))
    if is_mlx_adapter(folder):
        return folder
    raise BadCheckpoint(
        f"{folder}: not an adapter; PEFT's has adapter_config.json with 'peft_type', mlx-lm's has "
        "adapter_config.json and adapters.safetensors"
    )


def is_converted(files: list[Path], original: dict, config: dict) -> bool:
    """Whether a folder is mlx-lm's already: written by it, and read as its config says.

    Args:
        original, config: its config.json, and the same as a conversion would write it.
    """
    tensors = 0
    for path in files:
        if path.suffix != ".safetensors":
            return False
        header = read_header(path)
        if header.metadata.get("format") != "mlx":
            return False
        tensors += len(header.tensors)
    check_layers(config, tensors)
    return same_model(original, config)


def same_model(one: dict, other: dict) -> bool:
    """Whether mlx-lm builds the same model of two configs, told from its modules."""
    modules = modules_of(one)
    return modules is not None and modules == modules_of(other)


def modules_of(config: dict) -> list | None:
    model_class, args_class = model_classes(config)
    try:
        model = model_class(args_class.from_dict(config))
    except Exception:  # a config that the class cannot read is no converted one
        return None
    return [(path, type(m).__name__, settings_of(m)) for path, m in model.named_modules()]


def settings_of(module: nn.Module) -> tuple:
    """Plain attributes of a module, shapes of its parameters, and its tables."""
    plain = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str | type(None)) and not key.startswith("_")
    }
    arrays = {
        key: value.tolist() if key.startswith("_") else value.shape
        for key, value in module.items()
        if isinstance(value, mx.array)
    }
    return plain, arrays
