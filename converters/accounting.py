"""Which tensor of a checkpoint became which parameter, told from the computation itself.

mlx-lm's classes rename, split, stack and drop tensors in code of their own. MLX is lazy, so a
parameter still is the graph that computes it, and the tensors it came from are the leaves of that
graph. Nothing is computed to find out.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import mlx.core as mx

EDGE = re.compile(r'^"?([^"]+?)"? -> "?([^"]+?)"?$')


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, name: str, array: mx.array) -> "Tensor":
        return cls(name, tuple(array.shape), str(array.dtype).removeprefix("mlx.core."))

    def __str__(self):
        return f"{self.name} {list(self.shape)} {self.dtype}"


class Parameter(NamedTuple):
    """A parameter of the model and the tensors of the checkpoint that it is computed from."""

    tensor: Tensor
    origins: list[Tensor]


class Account:
    """Sees the tensors that a model class is given, and says what became of them.

    Args:
        instead: tensors that the class is given instead of those of the same names in its files.
    """

    def __init__(self, instead: dict[str, mx.array] | None = None):
        self.sources: dict[str, mx.array] = {}
        self.instead = instead or {}

    def watching(self, get_classes: Callable) -> Callable:
        """`get_classes` of mlx-lm's loader, whose class also tells this account what it is given."""

        def watched(config):
            model_class, args_class = get_classes(config)
            account = self

            class Watched(model_class):
                def sanitize(self, weights):
                    weights = {**weights, **account.instead}
                    account.sources = dict(weights)
                    known = getattr(super(), "sanitize", None)
                    return weights if known is None else known(weights)

            Watched.__name__, Watched.__qualname__ = model_class.__name__, model_class.__qualname__
            Watched.__module__ = model_class.__module__
            return Watched, args_class

        return watched

    def close(self, parameters: dict[str, mx.array]) -> tuple[list[Parameter], list[Tensor]]:
        """Settle the account, and let go of the arrays, so that memory can.

        Args:
            parameters: of the model, not yet computed.

        Returns: where each parameter comes from; and the tensors that nothing comes from.
        """
        tensors = {name: Tensor.of(name, array) for name, array in self.sources.items()}
        origins = trace(self.sources, parameters)
        self.sources = {}
        used = {name for names in origins.values() for name in names}
        rows = [
            Parameter(Tensor.of(name, array), [tensors[origin] for origin in origins[name]])
            for name, array in parameters.items()
        ]
        return rows, [tensor for name, tensor in tensors.items() if name not in used]


def trace(sources: dict[str, mx.array], targets: dict[str, mx.array]) -> dict[str, list[str]]:
    """For each target the sources in the graph that computes it, in the order of `sources`."""
    names = {f"source{i}": name for i, name in enumerate(sources)}
    # A target may be a source itself, and an array has one name: so name a node behind it.
    ends = [mx.stop_gradient(array) for array in targets.values()]
    marks = {f"target{i}": array for i, array in enumerate(ends)}
    text = io.StringIO()
    mx.export_to_dot(text, *ends, **dict(zip(names, sources.values(), strict=True)), **marks)
    inputs: dict[str, list[str]] = {}
    for line in text.getvalue().splitlines():
        if edge := EDGE.match(line.strip()):
            inputs.setdefault(edge[2], []).append(edge[1])
    order = {mark: i for i, mark in enumerate(names)}
    found = {}
    for mark, target in zip(marks, targets, strict=True):
        leaves = reachable(mark, inputs, names.keys())
        found[target] = [names[leaf] for leaf in sorted(leaves, key=order.__getitem__)]
    return found


def reachable(start: str, inputs: dict[str, list[str]], wanted) -> set[str]:
    """The wanted nodes behind `start`; what lies behind a wanted node does not matter."""
    seen, waiting, found = {start}, [start], set()
    while waiting:
        for node in inputs.get(waiting.pop(), ()):
            if node in seen:
                continue
            seen.add(node)
            if node in wanted:
                found.add(node)
            else:
                waiting.append(node)
    return found


def describe(rows: list[Parameter], unused: list[Tensor]) -> list[str]:
    """A line for each kind of tensor that was left over or appeared, layers counted together."""
    appeared = [row.tensor for row in rows if not row.origins]
    lines = []
    for tensors, say in ((unused, "unused"), (appeared, "made by the class, not from a tensor")):
        lines += [f"{say}: {kind}" for kind in in_kinds(tensors)]
    return lines


def in_kinds(tensors: Iterable[Tensor]) -> list[str]:
    """Tensors in few words: those that differ by a number in the name alone are one kind."""
    kinds = Counter(str(t._replace(name=re.sub(r"\d+", "*", t.name))) for t in tensors)
    return [kind + (f", {n} of them" if n > 1 else "") for kind, n in kinds.items()]
