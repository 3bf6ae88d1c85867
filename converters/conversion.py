"""A checkpoint in, an mlx-lm folder out: open, normalise, load, merge, cast, quantise, save."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from mlx.utils import tree_flatten

from mlx_specstream.errors import BadCheckpoint, SpecStreamError
from mlx_specstream.model.support import structural

from .accounting import Account, describe
from .apart import convert_apart, is_apart, is_converted, open_adapter
from .dry_run import describe_plan, describe_streams
from .formats import Checkpoint, locate, open_checkpoint
from .hf_config import normalise, transformers_view
from .mlx_adapter import fuse_adapter
from .model_card import kind_of_model, model_card, told, what_was_done
from .new_folder import check_free, new_folder, scratch_folder
from .precision import cast, check_arguments, check_packed, requantize
from .report import compare, encoded, logits_of
from .rotary import check_rotary
from .shards import Progress, save_weights
from .source import check_remote_code, copy_files, copy_tokenizer
from .staging import load_staged, one_line, stage_model, verify
from .torch_streams import write_streams


def convert(
    hf_path: str | Path,
    mlx_path: str | Path = "mlx_model",
    *,
    quantize: bool = False,
    q_group_size: int | None = None,
    q_bits: int | None = None,
    q_mode: str = "affine",
    quant_predicate: Callable | str | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    base: str | Path | None = None,
    adapter: str | Path | None = None,
    report: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    log: Callable[[str], None] | None = None,
    progress: Progress = lambda done, total: None,
    plan: Callable[[str], None] | None = None,
) -> Path | None:
    """Convert a checkpoint into a folder that mlx-lm loads; arguments as mlx-lm's, and a few more.

    Args:
        hf_path: a folder, a file or a Hub id: a Hugging Face checkpoint, a bare state dict, Meta's
            files, an adapter of PEFT, streams trained in PyTorch (docs/conversions.md).
        mlx_path: the new folder, which must not exist yet.
        quantize: with q_bits, q_group_size, q_mode, or a recipe's name or a function in
            quant_predicate.
        dtype: of the weights that stay unquantised; default: what the config says.
        base: a folder or Hub id with what the source lacks: config.json and tokenizer of a bare state
            dict, a tokenizer alone, the model that streams or an adapter belong to.
        adapter: of PEFT or mlx-lm, merged into the weights.
        report: say in `log` what all this did to the logits of a few prompts.
        revision: of hf_path.
        log: takes lines, a note among them for each kind of tensor that was left over.
        progress: takes bytes written and bytes in all.
        plan: for a dry run, takes a line for each tensor of the result; nothing is kept.

    Returns: the path of the new folder, or of the source where nothing is to be done (None for a
    dry run). A new folder appears at the end, whole, or not at all.
    Raises: BadArgument, BadCheckpoint or UnsupportedModel, each with one line.
    """
    quantization = (q_group_size, q_bits, q_mode, quant_predicate)
    check_arguments(quantize, dequantize, dtype, quantization)
    log = log or (lambda line: None)
    target = Path(mlx_path).expanduser()
    check_free(target)
    found = locate(hf_path, revision, trust_remote_code)
    if is_apart(found):
        changes = {"quantize": quantize, "dequantize": dequantize, "dtype": dtype}
        changes |= {"adapter": adapter, "report": report}
        return convert_apart(hf_path, found, target, base, changes, log, plan)
    checkpoint = open_checkpoint(found, base, trust_remote_code)
    source, original = checkpoint.folder, checkpoint.config
    fused = adapter and checkpoint.take_adapter(open_adapter(adapter, original))
    notes = check_remote_code(original, trust_remote_code)
    check_packed(original)
    checkpoint.settle_head()
    config, more = normalise(checkpoint.config)
    notes += more
    if not (quantize or dequantize or dtype or adapter or plan) and is_converted(
        checkpoint.files, original, config
    ):
        verify(found, trust_remote_code)
        log(f"note: {found} is in mlx-lm's layout already; nothing to convert, use it as it is")
        return found
    account = Account()
    keep = new_folder(target) if plan is None else scratch_folder()
    with keep as folder, scratch_folder() as stage:
        names = stage_model(
            checkpoint, config, stage, folder, trust_remote_code, log, plan is not None
        )
        model, config = load_staged(stage, trust_remote_code, account)
        notes += checkpoint.notes
        if "text_config" not in original:
            notes += rotary_notes(model, original)
        if why := structural(model):
            notes.append(f"this model decodes plainly, it cannot have streams: {why}")
        if (source / "streams").is_dir() and not checkpoint.streams:
            notes.append(
                f"its streams were left out; they fit the result: --streams {source}/streams"
            )
        for note in dict.fromkeys(notes):
            log(f"note: {note}")
        text = config.get("text_config")
        text = text if isinstance(text, dict) else {}
        dtype = dtype or config.get("torch_dtype") or text.get("dtype")
        if fused:
            model = fuse_adapter(model, fused, dequantize)
        cast(model, dtype, log)
        if checkpoint.streams and plan is None:
            write_streams(checkpoint.streams, model, folder / "streams")
            log("streams: their own folder, in float32")
        before = config
        model, config = requantize(model, config, quantize, dequantize, quantization, log)
        rows, unused = account.close(dict(tree_flatten(model.parameters())))
        for line in describe(rows, unused):
            log(line)
        if plan is not None:
            for line in (*describe_plan(rows, names), *describe_streams(checkpoint.streams)):
                plan(line)
            return None
        facts = what_was_done(config, dtype, len(rows), before)
        if adapter:
            facts["adapter merged into the weights"] = told(adapter)
        if base is not None and source != found:
            facts["config.json and tokenizer from"] = told(base)
        elif checkpoint.helper:
            facts["tokenizer from"] = told(base)
        if checkpoint.config is not original:
            facts["head"] = "a tensor of its own, though the source's config.json ties it"
        if checkpoint.streams:
            facts["streams"] = "trained in PyTorch, in the folder `streams`"
        card = model_card(target.name, hf_path, source, facts, kind_of_model(config))
        (folder / "README.md").write_text(card, encoding="utf-8")
        save(model, config, checkpoint, folder, trust_remote_code, progress)
        del model
        model, tokenizer = verify(folder, trust_remote_code)
        if report:
            prompts = encoded(tokenizer)
            before = logits_before(stage, fused, trust_remote_code, prompts)
            log(f"report: {compare(before, logits_of(model, prompts))}")
        for path in folder.glob("staged-*.safetensors"):
            path.unlink()
    log(f"wrote {target}")
    return target


def rotary_notes(model, config: dict) -> list[str]:
    """As `check_rotary`, with one line for settings that no formula can be made of."""
    try:
        with np.errstate(all="ignore"):  # no warnings: what is not finite is refused
            return check_rotary(model, transformers_view(config), config["model_type"])
    except SpecStreamError:
        raise
    except Exception as error:
        raise BadCheckpoint(
            f"config.json: its rope settings make no sense: {one_line(error)}"
        ) from None


def logits_before(stage: Path, adapter: Path | None, trusted: bool, prompts: list[list[int]]):
    """The logits of prompts before anything was cast or quantised."""
    model, _ = load_staged(stage, trusted)
    return logits_of(fuse_adapter(model, adapter, dequantize=True) if adapter else model, prompts)


def save(
    model, config: dict, checkpoint: Checkpoint, folder: Path, trusted: bool, progress
) -> None:
    from mlx_lm.utils import save_config

    vision = "vision_tower" in getattr(model, "model", {})
    save_weights(folder, model, progress)
    save_config(config, folder / "config.json", keep_vision_config=vision)
    copy_files(checkpoint.folder, folder, trusted)
    if checkpoint.helper:
        copy_tokenizer(checkpoint.helper, folder)
    if checkpoint.adapter:  # it may have brought tokens of its own
        copy_tokenizer(checkpoint.adapter.folder, folder)
    for name, text in checkpoint.more.items():
        if not (folder / name).exists():
            (folder / name).write_text(text, encoding="utf-8")
