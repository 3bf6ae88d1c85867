"""The workbench of a conversion: a new folder that appears whole, and what mlx-lm's loader is given."""

import contextlib
import errno
import io
import json
import os
import shutil
import tempfile
from pathlib import Path

from mlx_specstream.errors import BadArgument, BadCheckpoint, SpecStreamError
from mlx_specstream.model.architectures import model_classes

from .accounting import Account
from .plausible import check_layers
from .safetensors_header import check_safetensors
from .safetensors_writer import write_hollow, write_safetensors
from .source import CONFIG_FILES
from .weights import check_unique


@contextlib.contextmanager
def new_folder(target: Path):
    """A temporary sibling of `target` that becomes `target` at the end, or vanishes.

    Raises: SpecStreamError for a full disk or a folder that cannot be written; whatever happens,
    an interrupt included, no partial folder stays behind.
    """
    made, parent = [], target.absolute().parent
    folder = None
    try:
        for missing in reversed([p for p in (parent, *parent.parents) if not p.exists()]):
            missing.mkdir()
            made.append(missing)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
        yield folder
        os.umask(mask := os.umask(0))
        folder.chmod(0o777 & ~mask)  # mkdtemp makes private folders
        if os.path.lexists(target):  # made by someone else in the meantime
            raise BadArgument(f"{target} already exists; delete it or choose another --mlx-path")
        folder.rename(target)
    except BaseException as error:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        for empty in reversed(made):
            with contextlib.suppress(OSError):
                empty.rmdir()
        if isinstance(error, OSError):
            raise disk_error(target, error) from None
        raise


@contextlib.contextmanager
def scratch_folder():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def disk_error(target: Path, error: OSError) -> SpecStreamError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BadCheckpoint(f"cannot write {target}: the disk is full; free some space")
    return BadCheckpoint(f"cannot convert to {target}: {error}")


def stage_model(checkpoint, config, stage, folder, trusted, log, hollow=False):
    """Lay out in `stage` what mlx-lm's loader expects: normalised config, safetensors only.

    Safetensors are linked where nothing in them changes. Everything else becomes a safetensors file
    in `folder`, one at a time, so that memory holds one shard and MLX reads the rest lazily; a
    hollow one for a dry run.

    Returns: the names of the tensors of each file.
    """
    names, source = {}, checkpoint.folder
    for number, shard in enumerate(checkpoint.shards(folder)):
        linked, names[shard.path] = shard.path, shard.names
        if shard.tensors is not None:
            log(f"reading {shard.path.name}")
            tensors = shard.tensors(hollow)
            linked = folder / f"staged-{number:05d}.safetensors"
            (write_hollow if hollow else write_safetensors)(linked, tensors)
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

    Returns: the model.
    """
    for path in folder.glob("model*.safetensors"):
        check_safetensors(path)  # a full disk may have cut it short
    model, config = load_staged(folder, trusted)
    tokenizer_of(folder, config, trusted)
    return model


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
            f"needed beside the weights): {one_line(error)[:200]}"
        ) from None
