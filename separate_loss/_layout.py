"""Finds the class dimension after operators, and checks that samples keep their order.

The order of samples is that of memory, without the class dimension.
"""

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

from torch import Tensor

from separate_loss._torch import saved

# Operators, by the names of their autograd nodes: Add for AddBackward0.
# fmt: off
ELEMENTWISE = {
    "Add", "Alias", "Clamp", "ClampMax", "ClampMin", "Clone", "Div", "LogSigmoid", "LogSoftmax",
    "MaskedFill", "Mul", "NanToNum", "NativeDropout", "Neg", "Relu", "Rsub", "Sigmoid", "Softmax",
    "Softplus", "Sub", "Tanh", "ToCopy",
    "FakeQuantizePerChannelAffineCachemask", "FakeQuantizePerTensorAffineCachemask",
    "FusedMovingAvgObsFqHelper",
}
RESHAPING = {"Expand", "ReshapeAlias", "Squeeze", "UnsafeView", "Unsqueeze", "View"}
REORDERING = {"Permute", "T", "Transpose"}
# fmt: on


def dim_of(class_dim: int, sizes: Sequence[int]) -> int:
    """The index of the dimension `class_dim`, 1 or -1, in a tensor of these sizes."""
    return len(sizes) - 1 if class_dim == -1 or len(sizes) == 1 else 1


def _kind(node: Any) -> str:
    name: str = node.name()
    return name.split("Backward", 1)[0] if name[-1].isdigit() else name


def keeps_samples(node: Any) -> bool:
    """Whether an operator can keep the samples in order; that it does depends on the sizes."""
    kind = _kind(node)
    return kind in ELEMENTWISE or kind in RESHAPING or kind in REORDERING


def class_dim_after(
    operators: Sequence[Any], sizes: Sequence[int], final: Sequence[int], class_dim: int
) -> int | str:
    """The class dimension after operators, or the name of an operator that mixes samples.

    `operators` are autograd nodes, the last operator first. `sizes` and `class_dim` are those
    before the operators, `final` are the sizes after them.
    """
    # Sizes are found from the last operator to the first, dimensions from the first to the last.
    steps: list[tuple[str, Sequence[int], Sequence[int] | None, Sequence[int]]] = []
    after: Sequence[int] = tuple(final)
    for node in operators:
        kind = _kind(node)
        order: Sequence[int] | None = range(len(after))
        before = after
        if kind in RESHAPING:
            order, before = None, _sizes_before(node, after)
        elif kind in REORDERING:
            order = _order(node, len(after))
            if len(order) != len(after):
                return kind.lower()
            before = [after[order.index(dim)] for dim in range(len(after))]
        if prod(before) != prod(after):
            return kind.lower()
        steps.append((kind.lower(), before, order, after))
        after = before
    if list(after) != list(sizes):
        return steps[0][0] if steps else "broadcast"
    for name, before, order, after in reversed(steps):
        if order is None:
            places = [
                dim
                for dim, size in enumerate(after)
                if size == before[class_dim] and prod(after[:dim]) == prod(before[:class_dim])
            ]
            if not places:
                return name
            class_dim = places[-1]
        else:
            others = [dim for dim in order if dim != class_dim and before[dim] != 1]
            if others != sorted(others):
                return name
            class_dim = list(order).index(class_dim)
    return class_dim


def class_dim_of_view(
    view: Tensor, sizes: Sequence[int], strides: Sequence[int], class_dim: int
) -> int | None:
    """The class dimension of a view of a tensor with `sizes` and `strides`.

    None if the view leaves samples out or reorders them.
    """
    expected = _steps(zip(sizes, strides, strict=True), class_dim)
    for dim in reversed(range(view.ndim)):
        if (view.shape[dim], view.stride(dim)) == (sizes[class_dim], strides[class_dim]) and (
            _steps(zip(view.shape, view.stride(), strict=True), dim) == expected
        ):
            return dim
    return None


def _steps(dims: Iterable[tuple[int, int]], left_out: int) -> list[tuple[int, int]]:
    """The fewest sizes and strides that visit the same memory in the same order."""
    steps: list[tuple[int, int]] = []
    for dim, (size, stride) in enumerate(dims):
        if dim == left_out or size == 1:
            continue
        if steps and steps[-1][1] == size * stride:
            size *= steps.pop()[0]  # noqa: PLW2901
        steps.append((size, stride))
    return steps


def _sizes_before(node: Any, after: Sequence[int]) -> Sequence[int]:
    sizes = saved(node, "self_sym_sizes")
    if sizes is not None:
        return tuple(sizes)
    dim = saved(node, "dim")
    if _kind(node) != "Unsqueeze" or dim is None:
        return ()
    dim = _signed(dim) % len(after)
    return [*after[:dim], *after[dim + 1 :]]


def _order(node: Any, ndim: int) -> list[int]:
    """The input dimension of each output dimension; empty if it is unknown."""
    if _kind(node) == "Permute":
        return [_signed(dim) % ndim for dim in saved(node, "dims") or ()]
    swapped = (0, -1) if _kind(node) == "T" else (saved(node, "dim0"), saved(node, "dim1"))
    if None in swapped:
        return []
    first, second = (_signed(dim) % ndim for dim in swapped)
    order = list(range(ndim))
    order[first], order[second] = order[second], order[first]
    return order


def _signed(value: int) -> int:
    """Autograd nodes show dimensions as unsigned 64-bit numbers."""
    return value - 2**64 if value >= 2**63 else value
