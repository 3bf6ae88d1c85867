"""The state dict inside a pickled checkpoint, and the names of its tensors without their wrappers.

Training code saves more than the weights (`{"model": ..., "optimizer": ..., "epoch": 3}`), and the
classes around a model leave their marks in every name (`module.`, `_orig_mod.`).
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from mlx_specstream.errors import BadCheckpoint

from .families import PREFIX

WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module")
DEEPEST = 4  # wrappers around one another
# What DataParallel, FSDP, torch.compile and activation checkpoints put into names.
MARKS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# A module that holds the model; stripped only while what is left still begins like a model.
HOLDERS = ("module.", "base_model.", "base.", "model.", "net.", "llm.")
ROOTS = ("model.", "transformer.", "gpt_neox.", "lm_head.", "module.", "base.")


class State(NamedTuple):
    """A state dict, plain values that lay beside it, and what was left out."""

    tensors: dict[str, Any]
    values: dict[str, Any]
    ignored: list[str]


def find_state(tree: Any, is_tensor: Callable[[Any], bool]) -> State:
    """The dict of tensors in what a pickle holds: the tree itself, or under a usual name in it.

    Raises: BadCheckpoint when there is none, or more than one.
    """
    values, ignored, where = {}, [], ""
    for _ in range(DEEPEST + 1):
        if not isinstance(tree, dict):
            raise BadCheckpoint(
                f"expected a dict of tensors but the pickle is a {type(tree).__name__}"
            )
        wrappers = [key for key in WRAPPERS if isinstance(tree.get(key), dict)]
        if len(wrappers) > 1:
            raise BadCheckpoint(
                f"both {where}{wrappers[0]} and {where}{wrappers[1]} are dicts; save the model's "
                "state_dict alone"
            )
        if not wrappers:
            break
        beside = {key: value for key, value in tree.items() if key != wrappers[0]}
        values |= {k: v for k, v in beside.items() if isinstance(v, str | dict)}
        ignored += [f"{where}{key}" for key in beside]
        tree, where = tree[wrappers[0]], f"{where}{wrappers[0]}."
    tensors = {key: value for key, value in tree.items() if is_tensor(value)}
    for key, value in tree.items():
        if isinstance(key, str) and key in tensors:
            continue
        # Counters and the like may lie among the tensors, but not a model under an unknown name.
        if not tensors or not isinstance(key, str) or isinstance(value, dict | list):
            raise BadCheckpoint(
                f"entry {where + str(key)[:60]!r} is a {type(value).__name__}, not a tensor; save "
                "the model's state_dict"
            )
        values[key] = value
        ignored.append(where + key)
    return State(tensors, values, ignored)


def clean_names(names: Collection[str], family: str | None) -> dict[str, str]:
    """Name in the file -> name as transformers saves it (and mlx-lm reads it).

    Args:
        names: of all tensors of the checkpoint: a wrapper is one that all have.
        family: the model type.

    Raises: BadCheckpoint when two names become one, or for a model that was saved inside PEFT.
    """
    clean = {name: name for name in names}
    for mark in MARKS:
        clean = {name: new.replace(mark, "") for name, new in clean.items()}
    for _ in range(DEEPEST):
        prefix = holder(clean.values()) or ""
        clean = {name: new.removeprefix(prefix) for name, new in clean.items()}
    prefix = PREFIX.get(family)
    if prefix and any(new.startswith(prefix) for new in clean.values()):
        clean = {name: new.removeprefix(prefix) for name, new in clean.items()}
    if "embed_tokens.weight" in clean.values():  # saved without its head, as AutoModel does
        clean = {n: c if c.startswith("lm_head.") else f"model.{c}" for n, c in clean.items()}
    back = {}
    for name, new in clean.items():
        if ".lora_A." in new or ".base_layer." in new:
            raise BadCheckpoint(
                f"tensor {name!r} belongs to a LoRA inside the model; save the adapter with "
                "save_pretrained and pass it with --adapter, or save merge_and_unload()"
            )
        if back.setdefault(new, name) != name:
            raise BadCheckpoint(f"tensors {back[new]!r} and {name!r} would both become {new!r}")
    return clean


def holder(names: Collection[str]) -> str | None:
    """A prefix that all names share and that no model has by itself."""
    for prefix in HOLDERS:
        if names and all(name.startswith(prefix) for name in names):
            rest = [name.removeprefix(prefix) for name in names]
            if prefix == "module." or any(name.startswith(ROOTS) for name in rest):
                return prefix
    return None
