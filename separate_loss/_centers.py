"""The centers: read for the loss, moved by Eq. 6 to 8, and their gradient, in blocks of rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from separate_loss._checks import Form
from separate_loss._ops import Blocks, Rows, least_norm, read_norms, row_blocks, take, tangent
from separate_loss._terms import Number, normalize, simplex_constants
from separate_loss._tracing import has_values

# Alpha over the number of samples in a step, where no alpha is given.
CENTER_LR_PER_SAMPLE = 0.1


class CenterStatistics(NamedTuple):
    """What a step needs of the centers."""

    norms: Tensor  # (C, 1), infinite for centers that count as zero
    units: Tensor | None  # (C, d), if the centers are one block
    center_sum: Tensor  # the sum of all unit centers, (d,)
    gram: Tensor | None  # their Gram matrix, in the simplex form
    num_centers: Number  # how many of all centers are not zero
    num_classes: int  # C of all centers, of which these may be a shard

    def unit_rows(self, centers: Tensor, rows: Rows) -> Tensor:
        """Some of the unit centers."""
        if self.units is not None:
            return take(self.units, rows)
        return take(centers, rows) / take(self.norms, rows)

    def weighted_sum(
        self, weights: Tensor, centers: Tensor, class_weight: Tensor | None = None
    ) -> Tensor:
        """The product of weights (*, C) and the unit centers (C, d) times their class weights."""
        parts = []
        for rows in self.blocks(centers):
            units = self.unit_rows(centers, rows)
            if class_weight is not None:
                units = units * take(class_weight, rows).unsqueeze(-1)
            parts.append((weights if rows is None else weights[..., rows]) @ units)
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def blocks(self, centers: Tensor) -> Blocks:
        """Rows to work on one after the other."""
        return row_blocks(centers) if self.units is None else [None]

    def may_hold_zeros(self) -> bool:
        """Whether a center may count as zero."""
        return isinstance(self.num_centers, Tensor) or self.num_centers < self.num_classes


def read_centers(
    centers: Tensor, form: Form, differentiable: bool = False, *, by_class: bool | None = None
) -> CenterStatistics:
    """Reads all centers (C, d); differentiable to any order, or without a graph.

    The Gram matrix is (C, C) if `by_class`, else (d, d); None takes the smaller one.
    """
    (num_classes, d), blocks, simplex = centers.shape, row_blocks(centers), form == "simplex"
    by_class = num_classes < d if by_class is None else by_class
    if differentiable or (simplex and by_class):
        blocks = [None]
    norms, usable = read_norms(centers.detach())
    center_sum, gram = None, None
    for rows in blocks:
        units = take(centers, rows)
        if usable is not None:
            units = units.where(take(usable, rows), 0)
        units = normalize(units)[0] if differentiable else units / take(norms, rows)
        center_sum = units.sum(0) if center_sum is None else center_sum.add_(units.sum(0))
        if simplex and by_class:
            gram = units @ units.mT
        elif simplex:
            gram = units.mT @ units if gram is None else gram.addmm_(units.mT, units)
    num_centers: Number = num_classes
    if usable is not None:
        num_centers = usable.sum().to(norms.dtype)
        num_centers = num_centers.item() if has_values(num_centers) else num_centers
    assert center_sum is not None
    whole = units if len(blocks) == 1 else None
    return CenterStatistics(norms, whole, center_sum, gram, num_centers, num_classes)


class Push(NamedTuple):
    """Half the gradient of L_inter for unit centers, times a factor (Eq. 7).

    It is right but for a part along each center, to which the pair k = j adds.
    """

    vector: Tensor  # (d,)
    matrix: Tensor | None = None  # in the simplex form
    scale: float = 1.0  # of the matrix

    def of(self, units: Tensor) -> Tensor:
        """For some of the unit centers (K, d); (d,) where it is the same for all."""
        if self.matrix is None:
            return self.vector
        by_class = len(self.matrix) != units.shape[1]
        pair = (self.matrix, units) if by_class else (units, self.matrix)
        return torch.addmm(self.vector, *pair, alpha=self.scale)


def read_push(statistics: CenterStatistics, factor: Number) -> Push:
    """Eq. 7, or half the gradient of the simplex form, times a factor."""
    _, _, center_sum, gram, num_centers, num_classes = statistics
    if gram is None:
        return Push(center_sum * (factor / (2 * num_classes * (num_classes - 1))))
    a, scale = simplex_constants(num_centers)
    scale = 2 * scale * factor
    if isinstance(scale, Tensor):
        return Push(center_sum * (a * scale), gram * scale)
    return Push(center_sum * (a * scale), gram, scale)


def centers_gradient(
    centers: Tensor, statistics: CenterStatistics, sums: Tensor, inter_grad: Number,
    index: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The gradient of the loss for the centers (C, d).

    `inter_grad` is that for L_inter, and `sums` (K, d) that of L_intra for the unit centers: of the
    centers `index` (K,), which may repeat; None: of all centers, and the result is written over it.
    """
    push = read_push(statistics, 2 * inter_grad)
    whole = sums if index is None else torch.empty_like(centers)
    for rows in statistics.blocks(centers):
        norms, part = take(statistics.norms, rows), take(whole, rows)
        if index is not None and push.matrix is None:
            own = take(centers, rows)
            along = (own @ push.vector).unsqueeze(-1) / norms / norms
            torch.addcmul(push.vector, own, along, value=-1, out=part)
        else:
            units = statistics.unit_rows(centers, rows)
            pushed = push.of(units) if index is not None else part.add_(push.of(units))
            tangent(pushed, units, out=part)
        part.div_(norms)
    if index is None:
        return whole
    norms = take(statistics.norms, index)
    return whole.index_add_(0, index, tangent(sums, statistics.unit_rows(centers, index)) / norms)


def update_centers_(
    centers: Tensor, statistics: CenterStatistics, sums: Tensor, counts: Tensor,
    index: Tensor | None = None, *, center_lr: float | None, num_samples: Number | None = None,
    start_zeros: bool = False,
) -> None:  # fmt: skip
    """Applies Eq. 6 to 8 to centers (C, d), or to one shard of them, in place.

    `sums` (K, d) are sums of unit features, each over the samples of one class, and `counts` (K,)
    the numbers of these samples: for the centers `index` (K,), which may repeat; None: for all
    centers. `statistics` are those before the update, `center_lr` is alpha, and `num_samples` m;
    None takes `CENTER_LR_PER_SAMPLE` and the sum of the counts. `start_zeros` puts a zero center
    at the direction of its sum.
    """
    m = counts.sum() if num_samples is None else num_samples
    if isinstance(m, Tensor):
        m = m.item() or 1.0 if has_values(m) else m.masked_fill(m == 0, 1)
    rate = _center_lr(center_lr, m, statistics)
    if index is not None:
        counts = counts.new_zeros(len(centers)).index_add(0, index, counts)
    weight, push = (1 + counts).reciprocal() * (rate / (2 * m)), read_push(statistics, -rate)
    start_zeros = start_zeros and statistics.may_hold_zeros()
    if index is not None:
        _update_rows_(centers, statistics, sums, weight, push, start_zeros, index)
        return
    for rows in statistics.blocks(centers):
        units, norms = statistics.unit_rows(centers, rows), take(statistics.norms, rows)
        own, added = take(centers, rows), take(sums, rows)
        step = torch.addcmul(push.of(units), added, take(weight, rows).unsqueeze(-1))
        # Not `addcdiv_`, on which the compiler's C++ code generator fails.
        step = tangent(step, units) / norms
        if start_zeros:
            own.copy_(torch.where(norms.isinf(), _directions(added), own + step))
        else:
            own.add_(step)


def _update_rows_(
    centers: Tensor, statistics: CenterStatistics, sums: Tensor, weight: Tensor, push: Push,
    start_zeros: bool, index: Tensor,
) -> None:  # fmt: skip
    """Eq. 8 with sums for some of the centers, without a tensor of the size of the centers.

    Of 256 samples of 512 features, all centers at once take 1.4 ms in place of 0.65 at 1,000
    classes, and 27 in place of 7.5 at 10,000; these rows take 0.43 ms in place of 0.25 at 7.
    """
    # Eq. 6, of the centers before they change.
    norms = take(statistics.norms, index)
    weight = weight.index_select(0, index).unsqueeze(-1) / norms
    if start_zeros:
        weight = weight.masked_fill(norms.isinf(), 1)
    pull = tangent(sums, statistics.unit_rows(centers, index)) * weight
    if start_zeros:  # a row that is not finite starts anew
        rows_of_samples = centers.index_select(0, index).masked_fill(norms.isinf(), 0)
        centers.index_copy_(0, index, rows_of_samples)
    for rows in statistics.blocks(centers):
        _push_(take(centers, rows), take(statistics.norms, rows), statistics.units, push)
    centers.index_add_(0, index, pull)
    if start_zeros:
        moved = centers.index_select(0, index)
        centers.index_copy_(0, index, torch.where(norms.isinf(), _directions(moved), moved))


def _push_(centers: Tensor, norms: Tensor, units: Tensor | None, push: Push) -> None:
    """Eq. 8 without Eq. 6, of some rows."""
    if push.matrix is None:
        # c + tangent(v, u) / ||c|| = (1 - v . c / ||c||^3) c + v / ||c||; powers could overflow.
        along = (centers @ push.vector).unsqueeze(-1) / norms / norms / norms
        centers.mul_(1 - along).addcmul_(push.vector, norms.reciprocal())
        return
    units = centers / norms if units is None else units
    step = push.of(units)
    centers.addcdiv_(tangent(step, units, out=step), norms)


def _directions(sums: Tensor) -> Tensor:
    """Unit vectors, and zero for sums of zero."""
    norms = torch.linalg.vector_norm(sums, dim=-1, keepdim=True)
    return sums / torch.threshold(norms, least_norm(sums), torch.inf)


def _center_lr(
    center_lr: float | None, num_samples: Number, statistics: CenterStatistics
) -> Number:
    """Alpha of Eq. 8: as given, or in proportion to the samples, within a bound.

    With n unit centers Eq. 7 takes alpha / (2 (n - 1)) of their sum off that sum. With more than
    twice the sum it would grow. A single center takes the bound of two.
    """
    if center_lr is not None:
        return center_lr
    n = statistics.num_classes if statistics.gram is None else statistics.num_centers
    rate = CENTER_LR_PER_SAMPLE * num_samples
    if isinstance(n, Tensor):
        return (4 * (n - 1).clamp(min=1)).clamp(max=rate)
    bound = 4.0 * max(1, n - 1)
    return rate.clamp(max=bound) if isinstance(rate, Tensor) else min(rate, bound)
