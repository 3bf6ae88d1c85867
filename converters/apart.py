"""Sources that are no whole model: adapters and streams by themselves, and what needs no conversion."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_specstream.errors import BadArgument, BadCheckpoint
from mlx_specstream.model.architectures import model_classes

from .dry_run import describe_files
from .folder import check_folder
from .formats import locate, open_checkpoint, own_name
from .mlx_adapter import fuse_adapter, is_mlx_adapter, write_mlx_adapter
from .new_folder import new_folder, scratch_folder
from .peft_adapter import CONFIG as ADAPTER_CONFIG
from .peft_adapter import PeftAdapter, is_peft, read_peft
from .plausible import check_layers
from .safetensors_header import read_header
from .source import find_adapter
from .staging import staged_model
from .torch_streams import BASE, CONFIG, FILE, TRAINING, TorchStreams, write_streams
from .weight_file import is_weights, look_into, read_tensors
from .weights import has_weights, read_json

Log = Callable[[str], None]


def is_apart(path: Path) -> bool:
    """Whether a source is an adapter or streams, without their base."""
    return is_adapter(path) or streams_file(path) is not None


def convert_apart(
    path: Path,
    target: Path,
    base: str | Path | None,
    changes: dict[str, Any],
    log: Log,
    plan: Log | None,
) -> Path | None:
    """An adapter or streams to a folder of their own.

    Args:
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
            convert_adapter(path, folder, base, log)
        else:
            convert_streams(streams_file(path), folder, base)
        for line in describe_files(folder, path) if plan else ():
            plan(line)
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
        *map(values.get, (CONFIG, BASE, TRAINING)),
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


def convert_adapter(path: Path, folder: Path, base: str | Path | None, log: Log) -> None:
    """A PEFT adapter to an adapter folder of mlx-lm, apart from its base, which tells whether it fits."""
    check_folder(path)
    named = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    if base is None and isinstance(named, str) and (Path(named) / "config.json").is_file():
        base = named
    if base is None:
        log("note: the base is not here, so names were taken as they are; --base checks them")
        write_mlx_adapter(read_peft(path, None), folder, None)
        return
    checkpoint = open_checkpoint(locate(base))
    family = checkpoint.config.get("model_type")
    write_mlx_adapter(read_peft(path, family), folder, family)
    with scratch_folder() as room, staged_model(checkpoint, room) as model:
        fuse_adapter(model, folder)  # lazily: nothing is computed


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
