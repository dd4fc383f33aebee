"""The operators as vectorised PyTorch, linear in the samples and in the classes.

Shapes: N samples, C classes, d features. A hat is a vector over its norm: c^_j is the direction of
center j. A `target` is either class indices (N,) or class probabilities (N, C). A function whose
name ends in an underscore changes its first argument.
"""

import math
from typing import Any

import torch
from torch import Tensor

from separate_loss._checks import can_read
from separate_loss._torch import in_autocast, in_forward_mode, in_transform

# A block of centers stays in the processor's cache from one pass over it to the next.
BLOCK_ELEMENTS = 2**20
PARTS = 16
# Of the samples that count in a step: alpha where none is given.
RATE_PER_SAMPLE = 0.1
# So few, that the directions of all centers cost less than those of each sample's.
FEW_ELEMENTS = 2**16


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """The product left @ right in the type of its arguments, also inside an autocast region."""
    device = left.device.type
    if not in_autocast(device):
        return left @ right
    with torch.autocast(device, enabled=False):
        return left @ right


def _norms(vectors: Tensor) -> Tensor:
    """Norms over the last dimension; infinite for zero vectors, so that x / norm is zero for them.

    A vector counts as zero where its squared norm leaves the normal range of its type.
    """
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return torch.threshold(norms, torch.finfo(norms.dtype).tiny ** 0.5, torch.inf)


def _project(vectors: Tensor, units: Tensor, norms: Tensor) -> Tensor:
    """(v - (v . u) u) / norm: the derivative of normalising, which Eq. 5, 6 and 7 share."""
    return _across(vectors, units).div_(norms.unsqueeze(-1))


def _across(vectors: Tensor, units: Tensor) -> Tensor:
    """What vectors have across directions: v - (v . u) u."""
    along = (vectors * units).sum(-1, keepdim=True)
    return torch.addcmul(vectors, along, units, value=-1)


def _blocks(*per_class: Tensor) -> list[tuple[Tensor, ...]]:
    """The tensors in blocks of rows, where that helps: on the CPU, with nothing tracing."""
    centers = per_class[0]
    rows = max(1, BLOCK_ELEMENTS // centers.shape[1])
    if len(centers) <= rows or not can_read(centers):
        return [per_class]
    return list(zip(*(tensor.split(rows) for tensor in per_class), strict=True))


def norms_and_total(centers: Tensor) -> tuple[Tensor, Tensor]:
    """The centers' norms (C,) and the sum of their directions (d,), from one reading."""
    blocks = _blocks(centers)
    if len(blocks) == 1:
        norms = _norms(centers)
        return norms, matmul(norms.reciprocal(), centers)
    found, totals = [], []
    for (block,) in blocks:
        norms = _norms(block)
        found.append(norms)
        # A product with a vector runs on one thread, and several of them on all.
        even = len(block) // PARTS * PARTS
        weights = norms.reciprocal()
        parts = weights[:even].view(PARTS, 1, -1), block[:even].view(PARTS, -1, block.shape[1])
        totals += [matmul(*parts).sum((0, 1)), matmul(weights[even:], block[even:])]
    return torch.cat(found), torch.stack(totals).sum(0)


def _along(vector: Tensor, centers: Tensor, norms: Tensor) -> Tensor:
    """The part of a vector along each center, in lengths of the center, (C,)."""
    # On the CPU a product with a vector runs on one thread, and these two on all.
    products = (centers * vector).sum(-1) if can_read(centers) else matmul(centers, vector)
    return products / norms / norms


def _project_one(vector: Tensor, centers: Tensor, norms: Tensor) -> Tensor:
    """`_project` of one vector (d,) at every center, written once."""
    blocks = _blocks(centers, norms)
    if torch.is_grad_enabled() or len(blocks) == 1 or not can_read(vector):
        along = _along(vector, centers, norms).unsqueeze(-1)
        return torch.addcmul(vector, centers, along, value=-1).div_(norms.unsqueeze(-1))
    projected = torch.empty_like(centers)
    for (block, norm), out in zip(blocks, projected.split(len(blocks[0][0])), strict=True):
        along = _along(vector, block, norm).unsqueeze(-1)
        torch.addcmul(vector, block, along, value=-1, out=out).div_(norm.unsqueeze(-1))
    return projected


def _may_hold_zero(norms: Tensor) -> bool:
    """Whether some of these norms may be those of zero vectors; as far as that costs no wait."""
    return not can_read(norms) or math.isinf(norms.sum().item())


def fewer_classes(centers: Tensor, index: Tensor) -> bool:
    """Whether to work on all classes rather than on each sample's; compilers need no such help."""
    return not torch.compiler.is_compiling() and len(centers) <= len(index)


def _number(count: Tensor) -> Tensor | float:
    """As Python's number where that costs no wait."""
    return float(count) if can_read(count) else count


def _nonzero(count: Tensor | float) -> Tensor | float:
    if not isinstance(count, Tensor):
        return count or 1.0
    if can_read(count):
        return float(count) or 1.0
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
            grad = _plus(grad, grad_norms.unsqueeze(-1) * units)
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


class _ScaleFree(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(vectors: Tensor, norms: Tensor) -> Tensor:  # noqa: ARG004 - for the derivative
        return vectors.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], _: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


class _ScaleFreeWithForwardMode(_ScaleFree):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        scaled: Tensor = tangent * ctx.saved_tensors[0]
        return scaled


def scale_free(vectors: Tensor) -> Tensor:
    """Vectors (*, d) as they are, whose derivatives are multiplied by their norms.

    That is x + ||x|| (v - x) as a function of v, at v = x, with x and ||x|| held constant.
    """
    plain = not torch.compiler.is_compiling() and not in_transform()
    if plain and not (torch.is_grad_enabled() and vectors.requires_grad):
        return vectors
    norms = _norms(vectors.detach()).unsqueeze(-1)
    # Also where it is NaN, as an ignored sample has the gradient 0.
    norms = norms.masked_fill(~norms.isfinite(), 0)
    if not plain:
        function: Any = _ScaleFree if torch.compiler.is_compiling() else _ScaleFreeWithForwardMode
        same: Tensor = function.apply(vectors, norms)
        return same
    same = vectors.view_as(vectors)
    same.register_hook(lambda grad: grad * norms)
    return same


class _Compare(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(features: Tensor, centers: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        feature_norms = _norms(features)
        units = features / feature_norms.unsqueeze(-1)
        # By the centers alone: processes with other batches must come to the same sum.
        if centers.numel() <= FEW_ELEMENTS and not torch.compiler.is_compiling():
            norms = _norms(centers)
            directions = centers / norms.unsqueeze(-1)
            total, rows = directions.sum(0), directions.index_select(0, index)
        else:
            norms, total = norms_and_total(centers)
            rows = centers.index_select(0, index) / norms.index_select(0, index).unsqueeze(-1)
        # Rounding carries cosines past their bounds. Derivatives know nothing of that.
        cosines = (units * rows).sum(-1).clamp(-1, 1)
        return cosines, inter(total, norms), total, units, rows, feature_norms, norms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        _, centers, index = inputs
        cosines, of_centers, total, *others, norms = output
        held: Tensor | None = centers
        if not ctx.needs_input_grad[1]:
            held = None  # They may move before the backward pass.
            if torch.compiler.is_compiling() or not in_forward_mode():
                ctx.mark_non_differentiable(of_centers, total, norms)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(held, index, cosines, total, *others, norms)
        ctx.save_for_forward(centers, index, cosines, total, *others, norms)

    @staticmethod
    def backward(
        ctx: Any,
        grad_cosines: Tensor | None,
        grad_inter: Tensor | None,
        grad_total: Tensor | None,
        grad_units: Tensor | None,
        grad_rows: Tensor | None,
        grad_feature_norms: Tensor | None,
        grad_norms: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, None]:
        centers, index, cosines, total, units, rows, feature_norms, norms = ctx.saved_tensors
        of_features = of_centers = None
        if ctx.needs_input_grad[0]:
            of_features = _gradient(
                units, feature_norms, rows, cosines, grad_cosines, grad_units, grad_feature_norms
            )
        if ctx.needs_input_grad[1]:
            if grad_inter is not None:
                grad_total = _plus(grad_total, grad_inter * (2 / _pairs(len(norms))) * total)
            if grad_total is not None:
                of_centers = _project_one(grad_total, centers, norms)
            if grad_norms is not None:
                of_centers = _plus(of_centers, (grad_norms / norms).unsqueeze(-1) * centers)
            of_rows = _gradient(
                rows, norms.index_select(0, index), units, cosines, grad_cosines, grad_rows, None
            )
            if of_rows is not None:
                if of_centers is None:
                    of_centers = of_rows.new_zeros(centers.shape)
                # With a graph or a torch.func transform above, the two may differ in kind.
                out_of_place = torch.is_grad_enabled()
                add = of_centers.index_add if out_of_place else of_centers.index_add_
                of_centers = add(0, index, of_rows)
        return of_features, of_centers, None


class _CompareWithForwardMode(_Compare):
    @staticmethod
    def jvp(
        ctx: Any, features_tangent: Tensor | None, centers_tangent: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        centers, index, _, total, units, rows, feature_norms, norms = ctx.saved_tensors
        if features_tangent is None:
            features_tangent = torch.zeros_like(units)
        if centers_tangent is None:
            centers_tangent = torch.zeros_like(centers)
        center_units = centers / norms.unsqueeze(-1)
        of_units = _project(features_tangent, units, feature_norms)
        of_center_units = _project(centers_tangent, center_units, norms)
        of_rows = of_center_units.index_select(0, index)
        of_cosines = (of_units * rows + units * of_rows).sum(-1)
        of_feature_norms = (features_tangent * units).sum(-1)
        of_norms = (centers_tangent * center_units).sum(-1)
        of_total = of_center_units.sum(0)
        of_inter = (of_total * total).sum() * (2 / _pairs(len(norms)))
        return of_cosines, of_inter, of_total, of_units, of_rows, of_feature_norms, of_norms


class _ComparePlainly(torch.autograd.Function):
    """Without what torch.func and forward mode ask for, at less than half the cost of a call."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        output = _Compare.forward(*inputs)
        _Compare.setup_context(ctx, inputs, output)
        return output

    backward = _Compare.backward


def compare(features: Tensor, centers: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    """Samples beside the centers of their classes, in one reading of both.

    Returns the cosines x^_i . c^_{y_i} (N,), Eq. 3, the sum of all c^_j (d,), the directions x^_i
    and c^_{y_i} (N, d) each, and the norms of the features (N,) and of the centers (C,). The
    gradient for the centers is written once, densely, and the samples' rows added to it.
    """
    function: Any = _ComparePlainly
    if torch.compiler.is_compiling():
        function = _Compare
    elif in_transform():
        function = _CompareWithForwardMode
    compared: tuple[Tensor, ...] = function.apply(features, centers, index)
    return compared


def _gradient(
    units: Tensor,
    norms: Tensor,
    others: Tensor,
    cosines: Tensor,
    grad_cosines: Tensor | None,
    grad_units: Tensor | None,
    grad_norms: Tensor | None,
) -> Tensor | None:
    """For vectors, of their cosines with other directions, of their own directions and norms."""
    grad = None
    if grad_cosines is not None:
        # `_project`, where the part along the units is known already.
        factor = grad_cosines / norms
        along = (factor * cosines).unsqueeze(-1)
        grad = torch.addcmul(others * factor.unsqueeze(-1), units, along, value=-1)
    if grad_units is not None:
        grad = _plus(grad, _project(grad_units, units, norms))
    if grad_norms is not None:
        grad = _plus(grad, grad_norms.unsqueeze(-1) * units)
    return grad


def inter(total: Tensor, norms: Tensor) -> Tensor:
    """Eq. 3 from the sum of the centers' directions (d,) and their norms (C,)."""
    num_classes = len(norms)
    nonzero = (norms != torch.inf).sum() if _may_hold_zero(norms) else num_classes
    return inter_by_count(total, nonzero, num_classes)


def inter_by_count(total: Tensor, nonzero: Tensor | float, num_classes: int) -> Tensor:
    """Eq. 3 from the sum of the centers' directions (d,) and how many of them are not zero."""
    pairs = _pairs(num_classes)
    # Sum over all pairs, then without each center beside itself. A zero center has no direction.
    if isinstance(nonzero, Tensor):  # a quotient of integers would be in float32
        nonzero = _number(nonzero.to(total.dtype))
    alone = 0.5 - nonzero / pairs
    value = torch.rsub(matmul(total, total), alone, alpha=-1 / pairs)
    return within(value, (num_classes - 2) / (2 * (num_classes - 1)), 1)


def within(value: Tensor, least: float, most: float | Tensor) -> Tensor:
    """Undoes rounding past the bounds, and leaves the derivatives alone."""
    if value.ndim == 0 and can_read(value) and least <= value.item() <= most:
        return value
    return value + (value.clamp(min=least).clamp(max=most) - value).detach()


def _plus(grad: Tensor | None, more: Tensor) -> Tensor:
    return more if grad is None else grad + more


def rate_for(
    center_lr: float | None, batch_size: Tensor | float, num_classes: int
) -> Tensor | float:
    """Alpha of Eq. 8: as given, or a tenth of the samples that count in the step, within bounds.

    With unit centers Eq. 7 takes alpha / (2 (C - 1)) off the sum of their directions. Beyond twice
    the sum they would end farther on the other side, and grow.
    """
    if center_lr is not None:
        return center_lr
    rate, most = RATE_PER_SAMPLE * _nonzero(batch_size), 4.0 * (num_classes - 1)
    return rate.clamp(max=most) if isinstance(rate, Tensor) else min(rate, most)


def push_apart_(
    centers: Tensor,
    norms: Tensor,
    total: Tensor,
    rate: Tensor | float,
    *,
    num_classes: int | None = None,
    source: Tensor | None = None,
) -> None:
    """Takes rate times D_inter of Eq. 7 from the centers, or from a part of `num_classes` of them.

    With `source` from the centers there, which stay as they are; what `centers` hold is lost.
    The equation leaves k = j out. The whole sum gives the same, as no direction has a part across
    itself, and lets one vector serve all centers.
    """
    # Last, as a large rate beside large norms would overflow on the way.
    rate = rate / _pairs(len(centers) if num_classes is None else num_classes)
    push = total * -rate
    for block, norm, read in _blocks(centers, norms, centers if source is None else source):
        if source is not None:
            block.copy_(read)
        scale = (_along(total, block, norm) * rate / norm + 1).unsqueeze(-1)
        block.mul_(scale).addcmul_(push, norm.reciprocal().unsqueeze(-1))


def pull_by_index_(
    centers: Tensor,
    units: Tensor,
    index: Tensor,
    counted: Tensor | None,
    *,
    rows: Tensor,
    cosines: Tensor,
    norms: Tensor,
    rate: Tensor | float,
    start: bool,
    batch_size: Tensor | float,
) -> None:
    """Takes rate times D_intra of Eq. 6 from the centers.

    Args:
        centers: after Eq. 7, (C, d).
        units: unit features (N, d), zero where a sample does not count; or sums of them, within
            a class.
        index: the samples' classes (N,).
        counted: (N,), 1 where a sample counts and 0 where not, or how many are summed; None where
            each is one.
        rows: the unit centers of the samples' classes (N, d), before any step.
        cosines: units . rows, (N,).
        norms: the centers' norms (C,), before any step.
        rate: alpha.
        start: whether a zero center takes on the mean direction of its class's samples.
        batch_size: how many samples count, of which these may be a part.
    """
    samples = counted if counted is not None else torch.ones_like(cosines)
    count = torch.zeros_like(norms).index_add(0, index, samples).index_select(0, index)
    norms = norms.index_select(0, index)
    weight = _intra_weight(rate, batch_size, count) / norms
    starting = norms.isinf() if start and _may_hold_zero(norms) else None
    if starting is not None:
        # A zero center has a zero row: the sum of its samples' directions is all that it gets.
        weight = weight.masked_fill(starting, 1)
    along = (weight * cosines).unsqueeze(-1)
    pull = torch.addcmul(units * weight.unsqueeze(-1), rows, along, value=-1)
    centers.index_add_(0, index, pull)
    if starting is not None:
        # All samples of a class, counted or not, write one and the same row.
        rows = centers.index_select(0, index)
        rows = torch.where(starting.unsqueeze(-1), unit(rows)[0], rows)
        centers.index_copy_(0, index, rows)


def class_sums(
    units: Tensor, target: Tensor, counted: Tensor | None, num_classes: int
) -> tuple[Tensor, Tensor]:
    """What Eq. 6 needs of a batch: of each class the sum of directions (C, d) and the count (C,).

    Arguments as in `pull_by_index_`; the target may be class probabilities (N, C). A class with a
    share that is not finite has no sum and no count.
    """
    if target.is_floating_point():
        count = target.sum(0) if counted is None else matmul(counted, target)
        return matmul(target.mT, units).nan_to_num(0, 0, 0), count.nan_to_num(0, 0, 0)
    sums = units.new_zeros(num_classes, units.shape[1]).index_add_(0, target, units)
    if counted is None and can_read(target):
        return sums, target.bincount(minlength=num_classes).to(units.dtype)
    counted = units.new_ones(units.shape[0]) if counted is None else counted
    return sums, units.new_zeros(num_classes).index_add_(0, target, counted)


def move_by_sums_(
    centers: Tensor,
    norms: Tensor,
    push: Tensor,
    sums: Tensor,
    count: Tensor,
    *,
    rate: Tensor | float,
    start: bool,
    batch_size: Tensor | float,
    matrix: Tensor | None = None,
) -> None:
    """Eq. 8 from the sums of `class_sums`, with the push apart in the same pass.

    `push` (d,) for all centers or (C, d), and `matrix` (d, d), which takes a center's direction to
    what is added to its push, are as `push_of` has them. Under probabilities a zero center takes on
    a direction once its class has half a sample.
    """
    weight = _intra_weight(rate, batch_size, count).unsqueeze(-1)
    start = start and _may_hold_zero(norms)
    per_class = centers, norms.unsqueeze(-1), push.expand_as(centers), sums, weight, count
    for block, norm, push_, sums_, weight_, count_ in _blocks(*per_class):
        units = block / norm
        step = push_ if matrix is None else push_ + matmul(units, matrix)
        step = torch.addcmul(step, sums_, weight_)
        if torch.compiler.is_compiling():
            # Torch's C++ code generator fails on the other form, with KeyError: 'buf...'.
            block.add_(_across(step / norm, units))
        else:
            block.addcdiv_(_across(step, units), norm)
        if start:
            starting = norm.isinf() & (count_ >= 0.5).unsqueeze(-1)
            block.add_(unit(sums_)[0].where(starting, 0))


def push_of(total: Tensor, num_classes: int, rate: Tensor | float) -> Tensor:
    """Minus rate times D_inter of Eq. 7, times the norms, before it is projected, (d,)."""
    return total * (-rate / _pairs(num_classes))


def _intra_weight(rate: Tensor | float, batch_size: Tensor | float, count: Tensor) -> Tensor:
    """Alpha over the divisor before the sum in Eq. 6, for classes with `count` samples."""
    return (1 + count).reciprocal() * (rate / (2 * _nonzero(batch_size)))


def _pairs(num_classes: int) -> int:
    """Twice the number of ordered pairs of classes: the divisor of Eq. 3 and 7."""
    return 2 * num_classes * (num_classes - 1)
