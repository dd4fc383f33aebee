"""Operators with closed-form derivatives, linear in the number of samples and of classes.

Shapes: N samples, C classes, d features.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from separate_loss._torch import in_autocast, in_transform
from separate_loss._tracing import closed_form, has_values

# Values in a block of rows. A block stays in the processor's cache over several operators.
BLOCK_SIZE = 2**20


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """The product left @ right in the type of its arguments, also inside an autocast region."""
    device = left.device.type
    if not in_autocast(device):
        return left @ right
    with torch.autocast(device, enabled=False):
        return left @ right


def clamp_value(value: Tensor, lower: Any, upper: Any) -> Tensor:
    """Clamps rounding errors past the bounds; the derivative is that of the identity."""
    return value + (value.clamp(lower, upper) - value).detach()


def vector_norms(vectors: Tensor) -> Tensor:
    """Norms over the last dimension; infinite for zero vectors, so that v / norm is zero.

    A vector counts as zero where its squared norm leaves the normal range of its type.
    """
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return torch.threshold(norms, torch.finfo(norms.dtype).tiny ** 0.5, torch.inf)


def tangent(vectors: Tensor, units: Tensor) -> Tensor:
    """The part of vectors that is orthogonal to unit vectors: v - (v . u) u."""
    along = (vectors * units).sum(-1, keepdim=True)
    return torch.addcmul(vectors, along, units, value=-1)


def scale_gradient(features: Tensor) -> Tensor:
    """The features (N, d), with a derivative that is their norms, held constant, times identity."""
    if not (in_transform() or (torch.is_grad_enabled() and features.requires_grad)):
        return features
    constant = features.detach()
    norms = vector_norms(constant).unsqueeze(-1)
    # Ignored samples may hold anything, and have the gradient 0.
    norms = norms.masked_fill(~norms.isfinite(), 0)
    return constant + norms * (features - constant)


def row_blocks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Splits tensors of C rows each into blocks of rows, on the CPU and outside of tracing."""
    first = tensors[0]
    rows = max(1, BLOCK_SIZE // first.shape[1])
    if len(first) <= rows or not has_values(first):
        return [tensors]
    return list(zip(*(tensor.split(rows) for tensor in tensors), strict=True))


class _Normalize(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(vectors: Tensor) -> tuple[Tensor, Tensor]:
        norms = vector_norms(vectors)
        return vectors / norms.unsqueeze(-1), norms

    @staticmethod
    def setup_context(ctx: Any, _: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)

    @staticmethod
    def backward(ctx: Any, grad_units: Tensor | None, grad_norms: Tensor | None) -> Tensor | None:
        units, norms = ctx.saved_tensors
        grad = None
        if grad_units is not None:
            grad = tangent(grad_units, units).div_(norms.unsqueeze(-1))
        if grad_norms is not None:
            grad = _add(grad, grad_norms.unsqueeze(-1) * units)
        return grad

    @staticmethod
    def jvp(ctx: Any, vectors: Tensor) -> tuple[Tensor, Tensor]:
        units, norms = ctx.saved_tensors
        return tangent(vectors, units) / norms.unsqueeze(-1), (vectors * units).sum(-1)


_normalize = closed_form(_Normalize)


def normalize(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors (*, d) and norms (*) of vectors (*, d): 0 and infinity for a zero vector."""
    units, norms = _normalize(vectors)
    return units, norms


class _GatherCenters(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(centers: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        norms_of, sums = [], []
        for (block,) in row_blocks(centers):
            norms_of.append(vector_norms(block))
            sums.append(matmul(norms_of[-1].reciprocal(), block))
        norms, center_sum = torch.cat(norms_of), torch.stack(sums).sum(0)
        units = centers.index_select(0, index) / norms.index_select(0, index).unsqueeze(-1)
        return units, center_sum, norms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
        centers, index = inputs
        units, _, norms = output
        ctx.set_materialize_grads(False)
        # Centers without a gradient may change in place before the backward pass.
        ctx.save_for_backward(centers if ctx.needs_input_grad[0] else None, index, units, norms)
        ctx.save_for_forward(centers, index, units, norms)

    @staticmethod
    def backward(
        ctx: Any, grad_units: Tensor | None, grad_sum: Tensor | None, grad_norms: Tensor | None
    ) -> tuple[Tensor | None, None]:
        centers, index, units, norms = ctx.saved_tensors
        if centers is None:
            return None, None
        grad = None
        if grad_sum is not None:
            along = (matmul(centers, grad_sum) / norms / norms).unsqueeze(-1)
            grad = torch.addcmul(grad_sum, centers, along, value=-1).div_(norms.unsqueeze(-1))
        if grad_norms is not None:
            grad = _add(grad, (grad_norms / norms).unsqueeze(-1) * centers)
        if grad_units is not None:
            rows = tangent(grad_units, units) / norms.index_select(0, index).unsqueeze(-1)
            grad = rows.new_zeros(centers.shape) if grad is None else grad
            # With a graph or under a transform, one of the two may be of another kind.
            add = grad.index_add if torch.is_grad_enabled() else grad.index_add_
            grad = add(0, index, rows)
        return grad, None

    @staticmethod
    def jvp(ctx: Any, vectors: Tensor, _: None) -> tuple[Tensor, Tensor, Tensor]:
        centers, index, _, norms = ctx.saved_tensors
        all_units = centers / norms.unsqueeze(-1)
        of_units = tangent(vectors, all_units) / norms.unsqueeze(-1)
        return of_units.index_select(0, index), of_units.sum(0), (vectors * all_units).sum(-1)


_gather_centers = closed_form(_GatherCenters)


def gather_centers(centers: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the loss needs of centers (C, d) for samples with class indices (N,).

    Returns the unit centers of the samples' classes (N, d), the sum of all unit centers (d,), and
    the norms of all centers (C,). The gradient for the centers is written once.
    """
    target_centers, center_sum, norms = _gather_centers(centers, index)
    return target_centers, center_sum, norms


def _add(grad: Tensor | None, more: Tensor) -> Tensor:
    return more if grad is None else grad + more


def gram_matrix(units: Tensor, *, by_class: bool | None = None) -> Tensor:
    """The Gram matrix of unit centers: of classes (C, C) if C < d, else of dimensions (d, d)."""
    by_class = len(units) < units.shape[1] if by_class is None else by_class
    return matmul(units, units.mT) if by_class else matmul(units.mT, units)


def gram_of_centers(centers: Tensor, *, by_class: bool | None = None) -> Tensor:
    """`gram_matrix` of the unit centers; that of dimensions without a copy of all centers."""
    by_class = len(centers) < centers.shape[1] if by_class is None else by_class
    first, *others = [(centers,)] if by_class else row_blocks(centers)
    gram = gram_matrix(normalize(*first)[0], by_class=by_class)
    for block in others:
        gram = gram + gram_matrix(normalize(*block)[0], by_class=by_class)
    return gram


def gram_product(gram: Tensor, units: Tensor) -> Tensor:
    """The sum over all unit centers c of (u . c) c, for each u of the unit centers."""
    by_class = len(gram) != units.shape[1]
    return matmul(gram, units) if by_class else matmul(units, gram)
