"""What mlx-lm's loader is given: a normalised config beside safetensors that nothing is wrong with."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from mlx_specstream.errors import BadCheckpoint, SpecStreamError
from mlx_specstream.model.architectures import model_classes

from .accounting import Account
from .formats import Checkpoint
from .hf_config import normalise
from .new_folder import scratch_folder
from .plausible import check_layers
from .safetensors_header import check_safetensors
from .safetensors_writer import write_hollow, write_safetensors
from .source import CONFIG_FILES, check_remote_code
from .weight_file import is_pickled
from .weights import check_unique


def stage_model(
    checkpoint: Checkpoint,
    config: dict,
    stage: Path,
    room: Path,
    trusted: bool = False,
    log: Callable[[str], None] = lambda line: None,
    hollow: bool = False,
    lazy: dict[str, mx.array] | None = None,
) -> dict[Path, dict[str, str]]:
    """Lay out in `stage` what mlx-lm's loader expects: normalised config, safetensors only.

    Safetensors are linked where nothing in them changes. Everything else becomes a safetensors file
    in `room`, one at a time, so that memory holds one shard and MLX reads the rest lazily; a hollow
    one for a dry run.

    Args:
        lazy: takes the tensors that can be read lazily as they are; their files are hollow.

    Returns: for each file the names of its tensors, as transformers has them -> as the file has them.
    """
    names, source = {}, checkpoint.folder
    for number, shard in enumerate(checkpoint.shards(room)):
        linked, names[shard.path] = shard.path, shard.names
        if shard.tensors is not None:
            log(f"reading {shard.path.name}")
            tensors = shard.tensors(hollow)
            linked = room / f"staged-{number:05d}.safetensors"
            late = lazy is not None and (checkpoint.from_meta or not is_pickled(shard.path))
            if late:
                lazy |= tensors
            (write_hollow if hollow or late else write_safetensors)(linked, tensors)
            del tensors
        (stage / f"model-{number:05d}.safetensors").symlink_to(linked.resolve())
    if checkpoint.adapter:
        checkpoint.adapter.check_used()
    check_unique(names)
    check_layers(config, sum(map(len, names.values())))
    for name in CONFIG_FILES[1:]:
        if (source / name).is_file():
            shutil.copyfile(source / name, stage / name)
    if trusted and config.get("model_file"):
        shutil.copyfile(source / config["model_file"], stage / config["model_file"])
    (stage / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return names


@contextlib.contextmanager
def staged_model(checkpoint: Checkpoint, room: Path):
    """mlx-lm's model of a checkpoint as it is; its weights are lazy and gone with the context.

    Only pickled weights are written to `room`: they cannot be read piece by piece.
    """
    check_remote_code(checkpoint.config, False)
    checkpoint.settle_head()
    config, _ = normalise(checkpoint.config)
    with scratch_folder() as stage:
        lazy = {}
        stage_model(checkpoint, config, stage, room, lazy=lazy)
        yield load_staged(stage, False, Account(lazy))[0]


def load_staged(stage: Path, trusted: bool, account: Account | None = None):
    """Build mlx-lm's model from the staged folder, every parameter accounted for."""
    from mlx_lm.utils import load_model

    try:
        # mlx-lm prints warnings about settings that it ignores; those were checked before.
        with contextlib.redirect_stdout(io.StringIO()):
            return load_model(
                stage,
                lazy=True,
                strict=True,
                get_model_classes=account.watching(model_classes) if account else model_classes,
                trust_remote_code=trusted,
            )
    except (SpecStreamError, OSError):
        raise
    except Exception as error:  # model classes raise what they like on a config they cannot use
        raise BadCheckpoint(f"mlx-lm cannot load this checkpoint: {one_line(error)}") from None


def one_line(error: Exception, names: int = 3) -> str:
    """First line of an error, with a few of the parameter names that mlx lists below it."""
    first, *rest = str(error).strip().splitlines() or [""]
    rest = [line.strip(" ,.") for line in rest if line.strip()]
    more = f" and {len(rest) - names} more" if len(rest) > names else ""
    text = f"{first.strip()} {', '.join(rest[:names])}{more}".strip()
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def verify(folder: Path, trusted: bool):
    """Load the result as mlx-lm would: shapes, names and the tokenizer; weights stay on disk.

    Returns: the model and its tokenizer.
    """
    for path in folder.glob("model*.safetensors"):
        check_safetensors(path)  # a full disk may have cut it short
    model, config = load_staged(folder, trusted)
    return model, tokenizer_of(folder, config, trusted)


def tokenizer_of(folder: Path, config: dict, trusted: bool):
    from mlx_lm.utils import load_tokenizer

    try:
        return load_tokenizer(
            folder,
            {"trust_remote_code": trusted},
            eos_token_ids=config.get("eos_token_id"),
        )
    except Exception as error:  # tokenizers fail in many ways, a missing one included
        raise BadCheckpoint(
            "the tokenizer is missing or does not load (tokenizer.json or tokenizer.model is "
            "needed beside the weights, or a folder that has one with --base): "
            f"{one_line(error)[:200]}"
        ) from None
