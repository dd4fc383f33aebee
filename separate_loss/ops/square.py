"""The squared separation Q: how far each pair of centers is from the cosine of a simplex.

With a = 1 / (C - 1), the unit centers as rows of U (C, d), and their sum s (d,),

    Q = sum_{k != j} (c^_k . c^_j + a)^2 / (C (C - 1) (1 + a)^2)
      = (||U^T U||^2 - n + 2 a (||s||^2 - n) + a^2 n (n - 1)) (C - 1) / C^3

where n of the centers are not zero; a zero center has no direction and is in no pair. The Gram
matrix is the smaller of U^T U (d, d) and U U^T (C, C), which have the same norm.
"""

from typing import Any

import torch
from torch import Tensor

from separate_loss.ops.eager import (
    _across,
    _blocks,
    _may_hold_zero,
    _norms,
    _number,
    _project,
    matmul,
    within,
)


def _is_by_class(centers: Tensor) -> bool:
    """Whether the Gram matrix is that of the classes (C, C), not of the dimensions (d, d)."""
    return len(centers) <= centers.shape[1]


def gram(centers: Tensor, *, by_class: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The centers' norms (C,), the sum of their directions (d,), and a Gram matrix of these."""
    if by_class:
        norms = _norms(centers)
        units = centers / norms.unsqueeze(-1)
        return norms, units.sum(0), matmul(units, units.mT)
    found, dim = [], centers.shape[1]
    total, matrix = centers.new_zeros(dim), centers.new_zeros(dim, dim)
    for (block,) in _blocks(centers):
        norms = _norms(block)
        units = block / norms.unsqueeze(-1)
        found.append(norms)
        total = total + units.sum(0)
        matrix = matrix + matmul(units.mT, units)
    return torch.cat(found), total, matrix


def _weights(num_classes: int) -> tuple[float, float]:
    """1 over the divisor of Q, and a."""
    return (num_classes - 1) / num_classes**3, 1 / (num_classes - 1)


def square_of(total: Tensor, matrix: Tensor, nonzero: Tensor | float, num_classes: int) -> Tensor:
    """Q from the sum of directions, a Gram matrix, and how many centers are not zero."""
    share, a = _weights(num_classes)
    alone = nonzero * (1 + 2 * a) - a * a * nonzero * (nonzero - 1)
    value: Tensor = matrix.square().sum() + 2 * a * total.square().sum() - alone
    return within(value * share, 0, 1)


def _slopes(total: Tensor, matrix: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The gradient of Q for a center's direction: a vector, and a factor beside the directions.

    What it has along the direction itself, the pair with k = j among it, is projected away.
    """
    share, a = _weights(num_classes)
    return total * (4 * share * a), matrix * (4 * share)


def _spread(units: Tensor, matrix: Tensor, by_class: bool) -> Tensor:
    return matmul(matrix, units) if by_class else matmul(units, matrix)


class _Square(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(centers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        norms, total, matrix = gram(centers, by_class=_is_by_class(centers))
        nonzero: Tensor | float = len(norms)
        if _may_hold_zero(norms):
            nonzero = _number((norms != torch.inf).sum().to(norms.dtype))
        return square_of(total, matrix, nonzero, len(norms)), norms, total, matrix

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        _, *others = output
        ctx.set_materialize_grads(False)
        # Centers without a gradient may move before the backward pass.
        ctx.save_for_backward(inputs[0] if ctx.needs_input_grad[0] else None, *others)
        ctx.save_for_forward(inputs[0], *others)

    @staticmethod
    def backward(
        ctx: Any,
        grad_value: Tensor | None,
        grad_norms: Tensor | None,
        grad_total: Tensor | None,
        grad_matrix: Tensor | None,
    ) -> Tensor | None:
        centers, norms, total, matrix = ctx.saved_tensors
        if centers is None:
            return None
        vector = torch.zeros_like(total) if grad_total is None else grad_total
        product = torch.zeros_like(matrix)
        if grad_matrix is not None:
            product = grad_matrix + grad_matrix.mT
        if grad_value is not None:
            of_total, of_matrix = _slopes(total, matrix, len(centers))
            vector, product = vector + grad_value * of_total, product + grad_value * of_matrix
        of_centers = _gradient(centers, norms, vector, product)
        if grad_norms is not None:
            of_centers = of_centers + (grad_norms / norms).unsqueeze(-1) * centers
        return of_centers


class _SquareWithForwardMode(_Square):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        centers, norms, total, matrix = ctx.saved_tensors
        share, a = _weights(len(centers))
        units = centers / norms.unsqueeze(-1)
        of_units = _project(tangent, units, norms)
        one, other = (of_units, units.mT) if _is_by_class(centers) else (of_units.mT, units)
        half = matmul(one, other)
        of_matrix, of_total = half + half.mT, of_units.sum(0)
        of_value = 2 * (matrix * of_matrix).sum() + 4 * a * (total * of_total).sum()
        return of_value * share, (tangent * units).sum(-1), of_total, of_matrix


def _gradient(centers: Tensor, norms: Tensor, vector: Tensor, product: Tensor) -> Tensor:
    """For centers, of what is linear in their directions by a vector and by a matrix."""
    by_class, found = _is_by_class(centers), []
    whole = by_class or torch.is_grad_enabled()
    for block, norm in [(centers, norms)] if whole else _blocks(centers, norms):
        units = block / norm.unsqueeze(-1)
        found.append(_project(_spread(units, product, by_class) + vector, units, norm))
    return torch.cat(found) if len(found) > 1 else found[0]


def square(centers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q, the centers' norms (C,), the sum of their directions (d,), and the Gram matrix."""
    function: Any = _Square if torch.compiler.is_compiling() else _SquareWithForwardMode
    value, norms, total, matrix = function.apply(centers)
    return value, norms, total, matrix


def push_of_square(
    total: Tensor, matrix: Tensor, num_classes: int, rate: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Minus rate times half of the gradient of Q, times the norms, before it is projected.

    A vector (d,) for all centers, and a factor beside each center's direction, as `matrix` is one.
    """
    of_total, of_matrix = _slopes(total, matrix, num_classes)
    return of_total * (-0.5 * rate), of_matrix * (-0.5 * rate)


def by_dims(
    push: Tensor, matrix: Tensor, centers: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor | None]:
    """What `push_of_square` gives for `square`, with a matrix (d, d) or none."""
    if not _is_by_class(centers):
        return push, matrix
    return push + matmul(matrix, centers / norms.unsqueeze(-1)), None


def push_apart_by_(
    centers: Tensor,
    norms: Tensor,
    push: Tensor,
    matrix: Tensor | None,
    source: Tensor | None = None,
) -> None:
    """Adds a push to the centers, or to those of `source`, which stay as they are."""
    source = centers if source is None else source
    per_class = centers, norms.unsqueeze(-1), push.expand_as(centers), source
    for block, norm, push_, read in _blocks(*per_class):
        units = read / norm
        step = push_ if matrix is None else push_ + matmul(units, matrix)
        block.copy_(torch.addcdiv(read, _across(step, units), norm))
