"""Sources that are no whole model: adapters and streams by themselves, and what needs no conversion."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_specstream.errors import BadArgument, BadCheckpoint

from .folder import check_folder
from .formats import PICKLES, names_in, own_name, read_tensors, values_in
from .hf_config import find_classes
from .mlx_adapter import is_mlx_adapter, write_mlx_adapter
from .peft_adapter import CONFIG as ADAPTER_CONFIG
from .peft_adapter import PeftAdapter, is_peft, read_peft
from .safetensors_header import read_header
from .source import find_adapter, find_source, read_config
from .torch_streams import BASE, CONFIG, FILE, TRAINING, TorchStreams, write_streams
from .weights import read_json

Log = Callable[[str], None]


def streams_file(path: Path) -> Path | None:
    """The file of a source that holds streams and nothing else."""
    if path.is_dir() and not (path / "config.json").is_file() and (path / FILE).is_file():
        path = path / FILE
    if path.is_file() and path.suffix in (*PICKLES, ".safetensors"):
        names = names_in(path)
        return path if names and all(map(own_name, names)) else None
    return None


def convert_streams(path: Path, folder: Path, base: str | None, load: Callable) -> None:
    """Streams alone to a streams folder.

    Args:
        load: (folder) -> (model, config), lazily.

    Raises: BadArgument where nobody says which base they belong to.
    """
    values = values_in(path)
    source = TorchStreams(
        {own_name(name): value for name, value in read_tensors(path, False).items()},
        *(values.get(key) for key in (CONFIG, BASE, TRAINING)),
    )
    model = None
    if base is not None:
        model, _ = load(find_source(base))
    elif source.base is None:
        raise BadArgument(
            f"{path} does not say which base its streams belong to: give the base's mlx-lm folder "
            "with --base"
        )
    write_streams(source, model, folder)


def is_adapter(path: Path) -> bool:
    return (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file()


def convert_adapter(path: Path, folder: Path, base: str | None, log: Log) -> None:
    """A PEFT adapter to an adapter folder of mlx-lm, apart from its base."""
    check_folder(path)
    named = base or read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    family = None
    if base is not None or (isinstance(named, str) and (Path(named) / "config.json").is_file()):
        family = read_config(find_source(named)).get("model_type")
    else:
        log("note: the base is not here, so names were taken as they are; --base checks them")
    adapter = read_peft(path, family)
    write_mlx_adapter(adapter, folder, family)


def open_adapter(path: str, config: dict, revision: str | None) -> PeftAdapter | Path:
    """An adapter to merge into the model of a config: one of PEFT, or the folder of mlx-lm's."""
    folder = find_adapter(path, revision)
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
    for path in files:
        if path.suffix != ".safetensors" or read_header(path).metadata.get("format") != "mlx":
            return False
    return same_model(original, config)


def same_model(one: dict, other: dict) -> bool:
    """Whether mlx-lm builds the same model of two configs, told from its modules."""
    return modules_of(one) == modules_of(other)


def modules_of(config: dict) -> list | None:
    model_class, args_class = find_classes(config)
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
