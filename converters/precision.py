"""Dtype and quantisation of a converted model, by mlx-lm's own functions."""

import contextlib
import io

import mlx.core as mx
from mlx.utils import tree_map_with_path

from mlx_specstream.errors import BadArgument, UnsupportedModel

from .staging import one_line
from .weights import some

DTYPES = ("float16", "bfloat16", "float32")
MODES = {  # mode -> bits per weight and group sizes that MLX knows
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}
PACKED = ("awq", "bitnet", "compressed-tensors", "fp8", "gptq", "modelopt", "mxfp4", "mxfp8")
RECIPE_GROUP = 64  # weights per scale; the default of mlx-lm's recipes


def check_arguments(quantize, dequantize, dtype, quantization) -> None:
    """Raise BadArgument for what cannot succeed; `quantization` as `requantize` takes it."""
    group, bits, q_mode, quant_predicate = quantization
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
        if bits is not None:
            raise BadArgument(
                f"'q_bits' is {bits!r} but {quant_predicate!r} has bits of its own; leave out one of them"
            )
    for name, value, known in zip(
        ("q_bits", "q_group_size"), (bits, group), MODES[q_mode], strict=True
    ):
        if value is not None and value not in known:
            raise BadArgument(
                f"{name!r} must be {' or '.join(map(str, known))} for q_mode {q_mode!r} but got {value!r}"
            )


def check_packed(config: dict) -> None:
    """Raise UnsupportedModel for weights packed in a way that mlx-lm's loader does not know."""
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method is not None and method not in PACKED:
        raise UnsupportedModel(
            f"config.json says that the weights are packed by {str(method)[:60]!r}, which mlx-lm does "
            "not read; save the model unpacked (model.dequantize() in transformers) and convert that"
        )


def cast(model, dtype: str | None, log) -> None:
    """Cast the floating-point parameters, except those that the model wants to keep."""
    if dtype not in DTYPES:
        return
    wanted, new, old = (
        getattr(model, "cast_predicate", lambda name: True),
        getattr(mx, dtype),
        set(),
    )

    def to_dtype(name, value):
        if not (wanted(name) and mx.issubdtype(value.dtype, mx.floating)):
            return value
        old.add(str(value.dtype).removeprefix("mlx.core."))
        return value.astype(new)

    model.update(tree_map_with_path(to_dtype, model.parameters()))
    before = ", ".join(sorted(old - {dtype}))
    log(f"dtype {dtype}" + (f" (the checkpoint has {before})" if before else ""))


def unquantised(model) -> list[str]:
    """Paths of the layers that could be quantised and are not."""
    return [p for p, m in model.named_modules() if hasattr(m, "to_quantized") and "weight" in m]


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
    before = len(unquantised(model))
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
    left = unquantised(model)
    if len(left) == before:
        raise BadArgument(
            f"nothing was quantised with q_bits={bits}, q_group_size={group}: the rows are no multiple of "
            "the group, or the source is quantised already (convert it with --dequantize first)"
        )
    if left:
        log(
            f"{len(left)} layers stay unquantised (rows no multiple of a group, or not chosen): {some(left)}"
        )
    return model, config
