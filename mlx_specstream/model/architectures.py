"""Which classes make a model: mlx-lm's, or ours for an architecture that it lacks."""

from __future__ import annotations

import contextlib
import importlib
import re
from typing import Any

from mlx_lm.utils import _get_classes

from ..errors import UnsupportedModel

OWN = ("opt",)  # modules of this folder, in mlx-lm's conventions: Model, ModelArgs, sanitize
NAME = re.compile(r"[A-Za-z0-9_\-]+")


def model_classes(config: dict[str, Any]) -> tuple[type, type]:
    """(Model, ModelArgs) for a config.json; mlx-lm's loader takes it as `get_model_classes`.

    Raises: UnsupportedModel when neither has the architecture.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not NAME.fullmatch(model_type):
        raise UnsupportedModel(f"config.json must name a 'model_type' but has {model_type!r}")
    if model_type in OWN:
        module = importlib.import_module(f".{model_type}", __package__)
        return module.Model, module.ModelArgs
    try:
        # Some modules of mlx-lm print and exit when an extra package is absent.
        with contextlib.redirect_stdout(None):
            return _get_classes(config)
    except (ValueError, AttributeError, TypeError, ImportError, SystemExit):
        raise UnsupportedModel(
            f"mlx-lm has no usable architecture for model_type {model_type!r}; "
            "use a model of another family or update mlx-lm"
        ) from None
