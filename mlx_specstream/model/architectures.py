"""Which classes make a model: mlx-lm's, or ours for an architecture that it lacks."""

from __future__ import annotations

import importlib
from typing import Any

from mlx_lm.utils import _get_classes

OWN = ("opt",)  # modules of this folder, in mlx-lm's conventions: Model, ModelArgs, sanitize


def model_classes(config: dict[str, Any]) -> tuple[type, type]:
    """(Model, ModelArgs) for a config.json; mlx-lm's loader takes it as `get_model_classes`.

    Raises: ValueError when neither has the architecture, as mlx-lm does.
    """
    if config["model_type"] in OWN:
        module = importlib.import_module(f".{config['model_type']}", __package__)
        return module.Model, module.ModelArgs
    return _get_classes(config)
