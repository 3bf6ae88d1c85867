"""Notices that a parameter or a module of a model was replaced since the last look."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


class Watch:
    """Looks at every parameter and submodule of some modules.

    A compiled pass holds the arrays that it was traced with. Comparing which objects are there
    takes microseconds, so it is done before every answer.
    """

    def __init__(self, *modules: nn.Module):
        self._modules = modules
        self._places: list[tuple[Any, Any]] = []  # (container, key)
        self._found: list[Any] = []  # kept alive, so that no other object can take an identity

    def changed(self) -> bool:
        """Whether anything is another object than at the last call; True at the first."""
        now = [container[key] for container, key in self._places]
        if self._found and all(a is b for a, b in zip(now, self._found, strict=True)):
            return False
        self._places, self._found = [], []
        for module in self._modules:
            self._add(module)
        return True

    def _add(self, container) -> None:
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            value = container[key]
            if isinstance(value, dict | list | mx.array):  # a module is a dict
                self._places.append((container, key))
                self._found.append(value)
                if not isinstance(value, mx.array):
                    self._add(value)
