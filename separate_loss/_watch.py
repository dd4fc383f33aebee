"""Remembers what enters a module, for the one who gets what leaves it."""

import weakref
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Pass(NamedTuple):
    """A forward pass of the watched module."""

    features: Any  # what entered it
    recorded: bool  # whether autograd recorded it
    output: "weakref.ref[Tensor] | None"

    def alive(self) -> Tensor | None:
        return None if self.output is None else self.output()


class Watch:
    """A forward hook that keeps passes until they are taken."""

    def __init__(self) -> None:
        self.passes: tuple[Pass, ...] = ()

    def __call__(
        self, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        features = inputs[0] if inputs else next(iter(named.values()), None)
        recorded = torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            self.passes = (Pass(features, recorded, None),)
        elif torch._C._current_graph_task_id() == -1:
            # Not in a backward pass, where activation checkpointing runs the module once more.
            reference = weakref.ref(output) if isinstance(output, Tensor) else None
            self.passes = (*self._wanted(), Pass(features, recorded, reference))

    def take(self, output: Tensor) -> Pass | None:
        """The pass that `output` came from, or else the latest; None without any."""
        if not self.passes:
            return None
        found = self.passes[-1]
        for one in self.passes:
            left = one.alive()
            if left is not None and _base(left) is _base(output):
                found = one
        self.passes = tuple(one for one in self._wanted() if one is not found)
        return found

    def _wanted(self) -> tuple[Pass, ...]:
        """Passes whose output somebody may still bring; it holds as much as they do."""
        return tuple(one for one in self.passes if one.recorded and one.alive() is not None)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles of the watched module get a hook that does nothing and needs nothing
        # but Python: this method takes any arguments and returns None.
        return getattr, (nullcontext(), "__exit__")


def _base(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base
