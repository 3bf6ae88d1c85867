"""Hugging Face folder in, mlx-lm folder out: find, normalise, load, cast, quantise, save."""

import contextlib
import errno
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_map_with_path

from mlx_specstream.errors import BadArgument, BadCheckpoint, SpecStreamError

from .hf_config import normalise, transformers_view
from .rotary import check_rotary
from .source import CONFIG_FILES, check_remote_code, copy_files, find_source, read_config
from .torch_pickle import load_torch
from .weights import check_safetensors, check_unique, find_weights

DTYPES = ("float16", "bfloat16", "float32")
MODES = ("affine", "mxfp4", "nvfp4", "mxfp8")
RECIPE_GROUP = 64  # weights per scale; the default of mlx-lm's recipes


def convert(
    hf_path: str,
    mlx_path: str = "mlx_model",
    *,
    quantize: bool = False,
    q_group_size: int | None = None,
    q_bits: int | None = None,
    q_mode: str = "affine",
    quant_predicate: Callable | str | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    log: Callable[[str], None] | None = None,
) -> Path:
    """Convert a Hugging Face checkpoint into a folder that mlx-lm loads; arguments as mlx-lm's.

    hf_path: a folder or a Hub id. mlx_path: the new folder, which must not exist yet. quantize with
    q_bits, q_group_size, q_mode or a recipe name / function in quant_predicate. dtype: of the
    weights that stay unquantised; default: what the config says. log: takes progress lines.

    Returns: the path of the new folder. It appears at the end, whole, or not at all.
    Raises: BadArgument, BadCheckpoint or UnsupportedModel, each with one line.
    """
    check_arguments(quantize, dequantize, dtype, q_mode, quant_predicate)
    log = log or (lambda line: None)
    target = Path(mlx_path).expanduser()
    if os.path.lexists(target):
        raise BadArgument(f"{target} already exists; delete it or choose another --mlx-path")
    source = find_source(hf_path, revision, trust_remote_code)
    original = read_config(source)
    notes = check_remote_code(original, trust_remote_code)
    config, more = normalise(original)
    notes += more
    files = find_weights(source)
    with new_folder(target) as folder, tempfile.TemporaryDirectory() as stage:
        stage_model(source, files, config, Path(stage), folder, trust_remote_code, log)
        model, config = load_staged(Path(stage), trust_remote_code)
        if "text_config" not in original:
            notes += check_rotary(model, transformers_view(original), original["model_type"])
        for note in dict.fromkeys(notes):
            log(f"note: {note}")
        text = config.get("text_config") or {}
        cast(model, dtype or config.get("torch_dtype") or text.get("dtype"), log)
        quantization = (q_group_size, q_bits, q_mode, quant_predicate)
        model, config = requantize(model, config, quantize, dequantize, quantization, log)
        save(model, config, source, folder, trust_remote_code)
        del model
        for path in folder.glob("staged-*.safetensors"):
            path.unlink()
        verify(folder, trust_remote_code)
    log(f"wrote {target}")
    return target


def check_arguments(quantize, dequantize, dtype, q_mode, quant_predicate) -> None:
    if quantize and dequantize:
        raise BadArgument("choose either quantize or dequantize, not both")
    if dtype is not None and dtype not in DTYPES:
        raise BadArgument(f"'dtype' must be one of {', '.join(DTYPES)} but got {dtype!r}")
    if q_mode not in MODES:
        raise BadArgument(f"'q_mode' must be one of {', '.join(MODES)} but got {q_mode!r}")
    if isinstance(quant_predicate, str):
        from mlx_lm.convert import QUANT_RECIPES

        if quant_predicate not in QUANT_RECIPES:
            raise BadArgument(
                f"'quant_predicate' must be one of {', '.join(QUANT_RECIPES)} but got "
                f"{quant_predicate!r}"
            )
        if q_mode != "affine":
            raise BadArgument(f"a quantisation recipe needs q_mode 'affine' but got {q_mode!r}")


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


def disk_error(target: Path, error: OSError) -> SpecStreamError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BadCheckpoint(f"cannot write {target}: the disk is full; free some space")
    return BadCheckpoint(f"cannot convert to {target}: {error}")


def stage_model(source, files, config, stage, folder, trusted, log) -> None:
    """Lay out in `stage` what mlx-lm's loader expects: normalised config, safetensors only.

    Safetensors are linked. Each `.bin` becomes a safetensors file in `folder`, one at a time, so
    that memory holds one shard and MLX reads the rest lazily.
    """
    names = {}
    for number, path in enumerate(files):
        linked = path
        if path.suffix == ".bin":
            log(f"reading {path.name}")
            tensors = load_torch(path)
            linked = folder / f"staged-{number:05d}.safetensors"
            names[path] = set(tensors)
            write_tensors(linked, tensors)
            del tensors
        else:
            names[path] = check_safetensors(path)
        (stage / f"model-{number:05d}.safetensors").symlink_to(linked.resolve())
    check_unique(names)
    for name in CONFIG_FILES[1:]:
        if (source / name).is_file():
            shutil.copyfile(source / name, stage / name)
    if trusted and config.get("model_file"):
        shutil.copyfile(source / config["model_file"], stage / config["model_file"])
    (stage / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_tensors(path: Path, tensors: dict) -> None:
    try:
        mx.save_safetensors(str(path), tensors)
    except RuntimeError as error:  # MLX has no errno; a short write means a full disk
        raise short_write(path, error) from None


def short_write(path: Path, error: RuntimeError) -> OSError:
    full = "write" in str(error).lower() and shutil.disk_usage(path.parent).free < 1 << 24
    return OSError(errno.ENOSPC if full else errno.EIO, str(error))


def load_staged(stage: Path, trusted: bool):
    """Build mlx-lm's model from the staged folder, every parameter accounted for."""
    from mlx_lm.utils import load_model

    try:
        # mlx-lm prints warnings about settings that it ignores; those were checked before.
        with contextlib.redirect_stdout(io.StringIO()):
            return load_model(stage, lazy=True, strict=True, trust_remote_code=trusted)
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


def cast(model, dtype: str | None, log) -> None:
    """Cast the floating-point parameters, except those that the model wants to keep."""
    if dtype not in DTYPES:
        return
    log(f"dtype {dtype}")
    wanted = getattr(model, "cast_predicate", lambda name: True)

    def to_dtype(name, value):
        change = wanted(name) and mx.issubdtype(value.dtype, mx.floating)
        return value.astype(getattr(mx, dtype)) if change else value

    model.update(tree_map_with_path(to_dtype, model.parameters()))


def requantize(model, config: dict, quantize: bool, dequantize: bool, quantization, log):
    """Quantise or dequantise with mlx-lm's own functions; their prints go to `log`."""
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import dequantize_model, quantize_model

    if dequantize:
        config = {k: v for k, v in config.items() if not k.startswith("quantization")}
        return dequantize_model(model), config
    if not quantize:
        return model, config
    group, bits, mode, predicate = quantization
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            if isinstance(predicate, str):
                predicate = mixed_quant_predicate_builder(predicate, model, group or RECIPE_GROUP)
            model, config = quantize_model(
                model, config, group, bits, mode=mode, quant_predicate=predicate
            )
    except ValueError as error:
        raise BadArgument(
            f"cannot quantise with q_bits={bits}, q_group_size={group}, q_mode={mode!r}: "
            f"{one_line(error)}"
        ) from None
    for line in printed.getvalue().splitlines():
        log(line.removeprefix("[INFO] "))
    return model, config


def save(model, config: dict, source: Path, folder: Path, trusted: bool) -> None:
    from mlx_lm.utils import save_config, save_model

    vision = "vision_tower" in getattr(model, "model", {})
    try:
        save_model(folder, model, donate_model=True)
    except RuntimeError as error:
        raise short_write(folder / "model.safetensors", error) from None
    save_config(config, folder / "config.json", keep_vision_config=vision)
    copy_files(source, folder, trusted)


def verify(folder: Path, trusted: bool) -> None:
    """Load the result as mlx-lm would: shapes, names and the tokenizer; weights stay on disk."""
    from mlx_lm.utils import load_tokenizer

    for path in folder.glob("model*.safetensors"):
        check_safetensors(path)  # a full disk may have cut it short
    _, config = load_staged(folder, trusted)
    try:
        load_tokenizer(
            folder,
            {"trust_remote_code": trusted},
            eos_token_ids=config.get("eos_token_id"),
        )
    except Exception as error:  # tokenizers fail in many ways, a missing one included
        raise BadCheckpoint(
            "the tokenizer is missing or does not load (tokenizer.json or tokenizer.model is "
            f"needed beside the weights): {one_line(error)[:200]}"
        ) from None
