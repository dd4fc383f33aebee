"""Eq. 6 to 8, in place: one rule for class indices, class probabilities, processes and shards."""

from typing import NamedTuple

import torch
from torch import Tensor

from separate_loss._ops import gram_product, matmul, row_blocks, tangent, vector_norms
from separate_loss._separation import separation_gradient
from separate_loss._tracing import has_values

# Alpha over the number of samples in a step, where no alpha is given.
CENTER_LR_PER_SAMPLE = 0.1


class CenterStatistics(NamedTuple):
    """What an update needs of the centers before the update."""

    norms: Tensor  # of the centers to update
    center_sum: Tensor  # the sum of all unit centers, (d,)
    gram: Tensor | None  # their Gram matrix, for the squared separation
    num_classes: int  # C, of which the centers to update may be a shard


class _Push(NamedTuple):
    """Eq. 7 times -alpha: factor times (vector + `gram_product` of matrix and unit centers).

    Eq. 7 is half of the gradient of the separation, without its part along each center, over the
    norm of the center.
    """

    vector: Tensor  # (d,)
    matrix: Tensor | None
    factor: Tensor | float


def update_centers_(
    centers: Tensor,
    statistics: CenterStatistics,
    sums: Tensor,
    counts: Tensor,
    index: Tensor | None = None,
    *,
    center_lr: float | None,
    num_samples: Tensor | None = None,
    start_zeros: bool = False,
) -> None:
    """Applies Eq. 8.

    Args:
        centers: (C, d), or one shard of them.
        statistics: of the centers before the update.
        sums: sums of unit features, each over samples of one class, (K, d).
        counts: the numbers of samples in these sums, (K,).
        index: the center that each sum belongs to, (K,), which may repeat; None: sum k belongs to
            center k.
        center_lr: alpha; None takes `CENTER_LR_PER_SAMPLE`.
        num_samples: m, a scalar; None takes the sum of the counts.
        start_zeros: puts a zero center at the mean direction of its samples.
    """
    norms, center_sum, gram, num_classes = statistics
    num_samples = counts.sum() if num_samples is None else num_samples
    num_samples = num_samples.masked_fill(num_samples == 0, 1)
    rate = _center_lr(center_lr, num_samples, num_classes)
    start_zeros = start_zeros and not (has_values(norms) and bool(norms.isfinite().all()))
    push = _Push(*separation_gradient(center_sum, gram, num_classes), -0.5 * rate)
    if index is None:
        weight = rate / (2 * num_samples * (1 + counts))
        _update_all_(centers, norms, push, sums, counts, weight, start_zeros)
    else:
        class_counts = norms.new_zeros(len(norms)).index_add(0, index, counts)
        weight = rate / (2 * num_samples * (1 + class_counts))
        _update_rows_(centers, norms, push, sums, class_counts, weight, index, start_zeros)


def _update_all_(
    centers: Tensor,
    norms: Tensor,
    push: _Push,
    sums: Tensor,
    counts: Tensor,
    weight: Tensor,
    start_zeros: bool,
) -> None:
    """Eq. 8 with a sum for each center.

    One expression, because the compiler's C++ code generator fails on several in-place operators.
    """
    vector, matrix, factor = push
    columns = norms.unsqueeze(-1)
    units = centers / columns
    if matrix is not None:
        vector = vector + gram_product(matrix, units)
    step = torch.addcmul(vector * factor, sums, weight.unsqueeze(-1))
    updated = centers + tangent(step, units) / columns
    if start_zeros:
        starting = _is_zero(centers, norms) & (counts >= 0.5)
        directions = sums / vector_norms(sums).unsqueeze(-1)
        updated = torch.where(starting.unsqueeze(-1), directions, updated)
    centers.copy_(updated)


def _update_rows_(
    centers: Tensor,
    norms: Tensor,
    push: _Push,
    sums: Tensor,
    class_counts: Tensor,
    weight: Tensor,
    index: Tensor,
    start_zeros: bool,
) -> None:
    """Eq. 8 with sums for some of the centers, without a copy of the centers."""
    # Eq. 6, of the centers before they change.
    own_norms = norms.index_select(0, index)
    rows = centers.index_select(0, index)
    units = rows / own_norms.unsqueeze(-1)
    own_weight = weight.index_select(0, index) / own_norms
    starting = None
    if start_zeros:
        starting = _is_zero(rows, own_norms) & (class_counts.index_select(0, index) >= 0.5)
        own_weight = own_weight.masked_fill(starting, 1)
    pull = tangent(sums, units) * own_weight.unsqueeze(-1)

    _push_(centers, norms, push)
    centers.index_add_(0, index, pull)
    if starting is not None:
        rows = centers.index_select(0, index)
        directions = rows / vector_norms(rows).unsqueeze(-1)
        rows = torch.where(starting.unsqueeze(-1), directions, rows)
        centers.index_copy_(0, index, rows)


def _push_(centers: Tensor, norms: Tensor, push: _Push) -> None:
    """Eq. 8 without the sums."""
    vector, matrix, factor = push
    if matrix is None:
        # c + tangent(v, u) / ||c|| = (1 - v . u / ||c||^2) c + v / ||c||. The factor comes last: a
        # large one could overflow before it is divided by large norms.
        for block, norm in row_blocks(centers, norms):
            along = matmul(block, vector) / norm / norm * factor / norm
            block.mul_((1 - along).unsqueeze(-1))
            block.addcmul_(vector * factor, norm.reciprocal().unsqueeze(-1))
        return
    by_class = len(matrix) != len(vector)
    columns = norms.unsqueeze(-1)
    for block, norm in [(centers, columns)] if by_class else row_blocks(centers, columns):
        units = block / norm
        block.add_(tangent(vector + gram_product(matrix, units), units) * factor / norm)


def _is_zero(centers: Tensor, norms: Tensor) -> Tensor:
    """Which centers count as zero; `vector_norms` is infinite for norms that overflow too."""
    return norms.isinf() & (centers.abs().amax(-1) < 1)


def _center_lr(center_lr: float | None, num_samples: Tensor, num_classes: int) -> Tensor | float:
    """Alpha of Eq. 8: as given, or in proportion to the samples, within a bound.

    With unit centers Eq. 7 takes alpha / (2 (C - 1)) of their sum off that sum. With more than
    twice the sum it would grow.
    """
    if center_lr is not None:
        return center_lr
    return (CENTER_LR_PER_SAMPLE * num_samples).clamp(max=4.0 * (num_classes - 1))
