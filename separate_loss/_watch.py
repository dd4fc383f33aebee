"""Remembers what enters a module, for the one who gets what leaves it."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# Operators between what a head returns and the logits that the loss is called with, at most.
REACH = 1000


class Pass(NamedTuple):
    """A forward pass of the watched module."""

    features: Any  # what entered it
    version: int | None  # of the features, which in-place operators raise
    recorded: bool  # whether gradients were on
    output: Any = None  # where nothing else tells one pass from another


class Watch:
    """Keeps forward passes of a module until they are taken.

    A pass that autograd recorded hangs on the node of its output, lives as long as that, and is
    found again from whatever was computed from it. Others, and those of compiled code, which has no
    nodes, are kept here: the latest one, of compiled passes two.
    """

    def __init__(self) -> None:
        self.entered: tuple[Any, int | None] | None = None
        self.passes: tuple[Pass, ...] = ()

    def on(self, module: nn.Module) -> Callable[[], None]:
        """Starts watching; returns what ends it."""
        handles = (
            module.register_forward_pre_hook(_Hook(self._enter), with_kwargs=True),
            module.register_forward_hook(_Hook(self._leave), with_kwargs=True),
        )

        def end() -> None:
            for handle in handles:
                handle.remove()

        return end

    def take(self, logits: Tensor) -> Pass | None:
        """The pass that logits came from; None without any."""
        passes, self.passes = self.passes, ()
        if not passes or not torch.compiler.is_compiling():
            found: Pass | None = self._on_graph(logits)
            if found is not None:
                return found
        for one in passes:
            if one.output is logits:
                self.passes = tuple(other for other in passes if other is not one)
                return one
        if len(passes) > 1:
            raise RuntimeError(
                "several forward passes were compiled since the last call, and logits are the "
                "output of none of them; call the loss on the model's own output, or after each"
            )
        return passes[0] if passes else None

    def _on_graph(self, logits: Tensor) -> Pass | None:
        for node in islice(_graph(logits), REACH):
            if self in node.metadata:
                found: Pass = node.metadata.pop(self)
                return found
        return None

    # As torch.compiler.disable does, which would load the whole compiler. A compiled graph breaks
    # here only where the loss is compiled without the model.
    vars()["_on_graph"]._torchdynamo_disable = True

    def _enter(self, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if torch.compiler.is_exporting():
            return
        features = inputs[0] if inputs else next(iter(named.values()), None)
        version = None
        if not torch.compiler.is_compiling():
            if torch._C._current_graph_task_id() != -1:
                # In a backward pass: activation checkpointing runs the module once more.
                return
            if isinstance(features, Tensor) and not features.is_inference():
                version = features._version
        self.entered = features, version

    def _leave(self, _: nn.Module, inputs: Any, named: Any, output: Any) -> None:
        del inputs, named
        if self.entered is None:
            return
        one = Pass(*self.entered, recorded=torch.is_grad_enabled())
        self.entered = None
        if torch.compiler.is_compiling():
            kept = tuple(other for other in self.passes[-1:] if other.recorded)
            self.passes = (*kept, one._replace(output=output))
            return
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        nodes: list[Any] = [leaf.grad_fn for leaf in leaves if leaf.grad_fn is not None]
        for node in nodes:
            node.metadata[self] = one
        self.passes = () if nodes else (one,)


class _Hook:
    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    def __call__(self, *arguments: Any) -> None:
        self.call(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles of the watched module get a hook that does nothing and needs nothing
        # but Python: this method takes any arguments and returns None.
        return getattr, (nullcontext(), "__exit__")


def _graph(tensor: Tensor) -> Iterator[Any]:
    """The nodes of autograd's graph that a tensor came from, nearest first."""
    seen: set[Any] = set()
    nearest = [tensor.grad_fn]
    while nearest:
        further = []
        for node in nearest:
            if node is not None and node not in seen:
                seen.add(node)
                yield node
                further += [other for other, _ in node.next_functions]
        nearest = further
