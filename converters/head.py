"""Whether the head of a model is its embedding: config.json says so, and the tensors must agree.

As transformers 5 does (`PreTrainedModel.tie_weights`), two tensors that differ stay two, and one that
is alone stands for both. An adapter of PEFT changes the one that it names and not the other.
"""

import inspect
import re
from collections.abc import Callable, Collection
from typing import Any

import mlx.core as mx

from mlx_specstream.errors import BadCheckpoint, UnsupportedModel
from mlx_specstream.model.architectures import model_classes

from .dropped import check_dropped
from .hf_config import SAME_FAMILY
from .peft_adapter import PeftAdapter

HEAD = "lm_head.weight"
TIED = "tie_word_embeddings"
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "backbone.embeddings.weight")
LAYER = re.compile(r"(.*?)(layers|h)\.0\.")


def head_and_embedding(
    names: Collection[str], adapter: PeftAdapter | None, read: Callable[[str], mx.array]
) -> tuple[bool, dict[str, list[str]]]:
    """What becomes of the two tensors of a model whose config.json ties them.

    Args:
        names: of all tensors, as transformers has them.
        read: gives the tensor of a name, [tokens, width].

    Returns: whether they are one; and what each becomes, where that is not just itself.
    """
    embedding = embedding_in(names)
    if embedding is None:
        return True, {HEAD: []}
    if embedding not in names:
        return True, {HEAD: [embedding]}
    own = HEAD in names and not same(read(HEAD), read(embedding))
    if not own and not (adapter and parted(adapter, embedding, read)):
        if adapter:
            adapter.forget(HEAD)
        return True, {HEAD: []}
    return False, {} if HEAD in names else {embedding: [embedding, HEAD]}


def embedding_in(names: Collection[str]) -> str | None:
    """The name of the embedding; where a file left it out, the name that it would have."""
    found = [name for name in names if name.endswith(EMBEDDINGS)]
    layer = next(filter(None, map(LAYER.match, sorted(names))), None)
    if not found and HEAD in names and layer:
        found = [layer[1] + EMBEDDINGS[0 if layer[2] == "layers" else 1]]
    return found[0] if len(found) == 1 else None


def parted(adapter: PeftAdapter, embedding: str, read: Callable[[str], mx.array]) -> bool:
    """Whether an adapter makes two different tensors of one."""
    if not (adapter.changes(HEAD) or adapter.changes(embedding)):
        return False
    if adapter.settings.get("ensure_weight_tying") and adapter.changes(embedding):
        return False
    value = read(embedding)
    head, value = adapter.apply(HEAD, value), adapter.apply(embedding, value)
    # An embedding of more tokens than the base's takes the head along.
    return head.shape == value.shape and not same(head, value)


def same(one: mx.array, other: mx.array) -> bool:
    return one.shape == other.shape and mx.array_equal(one, other, equal_nan=True).item()


def untied(config: dict[str, Any]) -> dict[str, Any]:
    """A config whose head is a tensor of its own.

    Raises: UnsupportedModel where mlx-lm's class knows no such head.
    """
    config, family = {**config, TIED: False}, config["model_type"]
    args_class = model_classes({**config, "model_type": SAME_FAMILY.get(family, family)})[1]
    name = args_class.__module__.rpartition(".")[2]
    asked = {"model_type": family, TIED: False}
    try:
        check_dropped(asked, frozenset(inspect.signature(args_class).parameters), name)
    except BadCheckpoint:
        raise UnsupportedModel(
            f"the head ({HEAD!r}) differs from the embedding, but mlx-lm's class {name!r} has one tensor "
            "for both; leave the head out of the checkpoint, or train the adapter with ensure_weight_tying"
        ) from None
    return config
