"""The operators as vectorised PyTorch, linear in the samples and in the classes.

Shapes: N samples, C classes, d features. A hat is a vector over its norm: c^_j is the direction of
center j. A `target` is either class indices (N,) or class probabilities (N, C).
"""

from typing import Any

import torch
from torch import Tensor

from separate_loss._checks import can_read


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """The product left @ right in the type of its arguments, also inside an autocast region."""
    device = left.device.type
    if not torch.amp.is_autocast_available(device):
        return left @ right
    with torch.autocast(device, enabled=False):
        return left @ right


def _norms(vectors: Tensor) -> Tensor:
    """Norms over the last dimension; infinite for zero vectors, so that x / norm is zero for them.

    A vector counts as zero where its squared norm leaves the normal range of its type.
    """
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return norms.masked_fill(norms < torch.finfo(norms.dtype).tiny ** 0.5, torch.inf)


def _project(vectors: Tensor, units: Tensor, norms: Tensor) -> Tensor:
    """(v - (v . u) u) / norm: the derivative of normalising, which Eq. 5, 6 and 7 share."""
    along = (vectors * units).sum(-1, keepdim=True)
    return torch.addcmul(vectors, along, units, value=-1).div_(norms.unsqueeze(-1))


def _project_one(vector: Tensor, centers: Tensor, norms: Tensor) -> Tensor:
    """`_project` of one vector (d,) at every center, with no copy of the centers' directions."""
    along = matmul(centers, vector) / norms / norms
    return torch.addcmul(vector, centers, along.unsqueeze(-1), value=-1).div_(norms.unsqueeze(-1))


def _nonzero(count: Tensor) -> Tensor:
    return count.masked_fill(count == 0, 1)


# Two rules hold for the functions below. Beside their inputs they save outputs only: autograd knows
# how these depend on the inputs, and so gets second derivatives right. And forward mode lives in a
# subclass, because torch.compile accepts no function that defines it.


class _Unit(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(vectors: Tensor) -> tuple[Tensor, Tensor]:
        norms = _norms(vectors)
        return vectors / norms.unsqueeze(-1), norms

    @staticmethod
    def setup_context(ctx: Any, _: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)

    @staticmethod
    def backward(ctx: Any, grad_units: Tensor | None, grad_norms: Tensor | None) -> Tensor | None:
        units, norms = ctx.saved_tensors
        grad = None if grad_units is None else _project(grad_units, units, norms)
        if grad_norms is not None:
            grad_along = grad_norms.unsqueeze(-1) * units
            grad = grad_along if grad is None else grad + grad_along
        return grad


class _UnitWithForwardMode(_Unit):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor]:
        units, norms = ctx.saved_tensors
        return _project(tangent, units, norms), (tangent * units).sum(-1)


def unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors (*, d) over their norms, and the norms (*): zero and infinity for a zero vector."""
    function: Any = _Unit if torch.compiler.is_compiling() else _UnitWithForwardMode
    units, norms = function.apply(vectors)
    return units, norms


class _UnitRows(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(centers: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        norms = _norms(centers)
        rows = centers.index_select(0, index) / norms.index_select(0, index).unsqueeze(-1)
        return rows, matmul(norms.reciprocal(), centers), norms

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        rows, _, norms = output
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, rows, norms)
        ctx.save_for_forward(*inputs, norms)

    @staticmethod
    def backward(
        ctx: Any, grad_rows: Tensor | None, grad_total: Tensor | None, grad_norms: Tensor | None
    ) -> tuple[Tensor | None, None]:
        centers, index, rows, norms = ctx.saved_tensors
        grad = None
        if grad_total is not None:
            grad = _project_one(grad_total, centers, norms)
        if grad_norms is not None:
            grad_along = (grad_norms / norms).unsqueeze(-1) * centers
            grad = grad_along if grad is None else grad + grad_along
        if grad_rows is not None:
            grad_rows = _project(grad_rows, rows, norms.index_select(0, index))
            if grad is None:
                grad = grad_rows.new_zeros(centers.shape)
            # With a graph or a torch.func transform above, the two parts may differ in kind.
            add = grad.index_add if torch.is_grad_enabled() else grad.index_add_
            grad = add(0, index, grad_rows)
        return grad, None


class _UnitRowsWithForwardMode(_UnitRows):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, Tensor, Tensor]:
        centers, index, norms = ctx.saved_tensors
        units = centers / norms.unsqueeze(-1)
        units_tangent = _project(tangent, units, norms)
        norms_tangent = (tangent * units).sum(-1)
        return units_tangent.index_select(0, index), units_tangent.sum(0), norms_tangent


def unit_rows(centers: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One reading of the centers (C, d): c^_{y_i} (N, d), sum_j c^_j (d,) and the norms (C,).

    Its gradient for the centers is written once, densely, and the samples' rows added to it.
    """
    function: Any = _UnitRows if torch.compiler.is_compiling() else _UnitRowsWithForwardMode
    rows, total, norms = function.apply(centers, index)
    return rows, total, norms


def push_apart(centers: Tensor, norms: Tensor, total: Tensor, rate: float) -> Tensor:
    """A new tensor, the centers minus rate times D_inter of Eq. 7.

    The equation leaves k = j out. The whole sum gives the same, as no direction has a part across
    itself, and lets one vector serve all centers.
    """
    num_classes = centers.shape[0]
    moved = _project_one(total, centers, norms)
    return moved.mul_(-rate / (2 * num_classes * (num_classes - 1))).add_(centers)


def pull_by_index(
    moved: Tensor,
    units: Tensor,
    index: Tensor,
    counted: Tensor,
    *,
    rows: Tensor,
    cosines: Tensor,
    norms: Tensor,
    rate: float,
    start: bool,
) -> Tensor:
    """Takes rate times D_intra of Eq. 6 from `moved`, in place, for class indices.

    Args:
        moved: centers after Eq. 7, (C, d).
        units: unit features (N, d), zero where a sample does not count.
        index: the samples' classes (N,).
        counted: (N,), 1 where a sample counts and 0 where not.
        rows: the unit centers of the samples' classes (N, d), before any step.
        cosines: units . rows, (N,).
        norms: the centers' norms (C,), before any step.
        rate: alpha.
        start: whether a zero center takes on the mean direction of its class's samples.
    """
    count = torch.zeros_like(norms).index_add(0, index, counted).index_select(0, index)
    norms = norms.index_select(0, index)
    weight = rate / 2 * counted / (_nonzero(counted.sum()) * (1 + count) * norms)
    starting = norms.isinf()
    if start:
        # A zero center has a zero row: the sum of its samples' directions is all that it gets.
        weight = weight.masked_fill(starting, 1)
    along = (weight * cosines).unsqueeze(-1)
    pull = torch.addcmul(units * weight.unsqueeze(-1), rows, along, value=-1)
    moved.index_add_(0, index, pull)
    if start and (not can_read(starting) or bool(starting.any())):
        # All samples of a class, counted or not, write one and the same row.
        rows = moved.index_select(0, index)
        rows = torch.where(starting.unsqueeze(-1), unit(rows)[0], rows)
        moved.index_copy_(0, index, rows)
    return moved


def pull_by_probability(
    moved: Tensor,
    units: Tensor,
    target: Tensor,
    counted: Tensor,
    *,
    center_units: Tensor,
    norms: Tensor,
    rate: float,
    start: bool,
) -> Tensor:
    """As `pull_by_index`, for class probabilities (N, C); `center_units` (C, d) before any step.

    A zero center takes on a direction once its class has half a sample. Probabilities that are not
    finite pull nothing.
    """
    count = matmul(counted, target).nan_to_num(0, 0, 0)
    sums = matmul(target.mT, units).nan_to_num(0, 0, 0)
    weight = rate / 2 / (_nonzero(count.sum()) * (1 + count))
    pull = _project(sums, center_units, norms) * weight.unsqueeze(-1)
    if start:
        starting = (norms.isinf() & (count >= 0.5)).unsqueeze(-1)
        pull = torch.where(starting, unit(sums)[0], pull)
    return moved.add_(pull)
