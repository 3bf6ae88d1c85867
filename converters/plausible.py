"""Numbers of a config.json that no model has, before anyone builds a model of that size."""

import re

from mlx_specstream.errors import BadCheckpoint

DEEPEST = 32  # dicts and lists inside one another; copying recurses
COUNT = re.compile(r"layer|expert|head|block|group|stream")
LARGEST = 10_000  # layers, experts, heads: models have hundreds
LONGEST_NAME = 500  # characters of a tensor's name
LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


def check_plausible(config, source: str = "config.json") -> None:
    """Raise BadCheckpoint for a count beyond any model, or for settings that nest endlessly."""
    waiting = [(source, config, 0)]
    while waiting:
        key, value, depth = waiting.pop()
        if depth > DEEPEST:
            raise BadCheckpoint(f"{source} nests deeper than {DEEPEST} levels")
        if isinstance(value, dict):
            waiting += [(inner, item, depth + 1) for inner, item in value.items()]
        elif isinstance(value, list):
            waiting += [(key, item, depth + 1) for item in value]
        elif isinstance(value, int | float) and abs(value) > LARGEST and is_count(key):
            raise BadCheckpoint(
                f"{source} sets {key[:60]!r} beyond {LARGEST}; no model has so many"
            )


def is_count(key: str) -> bool:
    """Whether a setting counts parts of a model, which are built one by one."""
    return COUNT.search(key) is not None and not key.endswith(("_size", "_dim", "_rank"))


def check_names(names) -> None:
    """Raise BadCheckpoint for a tensor's name that no program gives."""
    for name in names:
        if len(name) > LONGEST_NAME:
            raise BadCheckpoint(
                f"tensor {name[:60]!r}... has a name of {len(name)} characters; at most "
                f"{LONGEST_NAME} are read"
            )


def check_layers(config: dict, tensors: int) -> None:
    """Raise BadCheckpoint where a config promises more layers than its checkpoint has tensors."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in LAYERS:
            if isinstance(part.get(key), int | float) and part[key] > tensors:
                raise BadCheckpoint(
                    f"config.json sets {key!r} to {part[key]} but the checkpoint has only "
                    f"{tensors} tensors"
                )
