"""The equations of the paper as stateless functions.

Y. Li, Y. Lu, J. Li, G. Lu, "Separate Loss for Basic and Compound Facial Expression Recognition in
the Wild", ACML 2019, Proceedings of Machine Learning Research 101:897-911. Equation numbers are the
paper's. Shapes: N samples or any leading dimensions `*`, C classes, d features; a hat is a vector
over its norm.

Everything is computed, and every loss returned, in float32 or wider; gradients come in the type of
what they belong to. Vectors whose norm is below 1e-19 or above 1e19 in float32 count as zero: their
cosine with anything is 0, and so is their gradient. One exception: `backward` called inside an
autocast region runs the matrix products of class probabilities in half precision.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from separate_loss import ops
from separate_loss._checks import (
    REDUCTIONS,
    SEPARATIONS,
    Reduction,
    Separation,
    can_read,
    check_batch,
    check_beside_centers,
    check_bool,
    check_center_lr,
    check_centers,
    check_choice,
    check_device,
    check_int,
    check_vectors,
    split_ignored,
)

if TYPE_CHECKING:
    from separate_loss.ops.fused import Step

__all__ = [
    "inter_class_loss",
    "intra_class_loss",
    "separate_loss",
    "similarity",
    "update_centers",
]


def similarity(a: Tensor, b: Tensor) -> Tensor:
    r"""Cosine similarity over the last dimension, moved to [0, 1].

    $$
    \operatorname{Sim}(a, b) = \frac{1}{2} \left( \frac{a^T b}{\|a\| \|b\|} + 1 \right) \tag{1}
    $$

    Args:
        a: floating point, `(*, d)`.
        b: floating point, `(*, d)`; the leading dimensions broadcast against those of `a`.

    Returns:
        Similarities `(*)`; 1/2 where either vector is zero.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: the shapes do not broadcast, or the devices differ.

    Examples:
        >>> others = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> similarity(torch.tensor([3.0, 0.0]), others)
        tensor([1.0000, 0.5000, 0.0000])

    """
    check_vectors("a", a)
    check_vectors("b", b)
    check_device("b", b, "a", a)
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"b must have {a.shape[-1]} values in the last dimension, as a has, "
            f"got shape {tuple(b.shape)}"
        )
    try:
        torch.broadcast_shapes(a.shape, b.shape)
    except RuntimeError:
        raise ValueError(
            f"b must have a shape that broadcasts with {tuple(a.shape)}, got {tuple(b.shape)}"
        ) from None
    dtype = _compute_dtype(a, b)
    (a, _), (b, _) = ops.unit(a.to(dtype)), ops.unit(b.to(dtype))
    return ops.within(((a * b).sum(-1) + 1) / 2, 0, 1)


def intra_class_loss(
    features: Tensor,
    target: Tensor,
    centers: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    scale_free: bool = False,
) -> Tensor:
    r"""How far samples point away from the centers of their classes, in [0, 1].

    $$ L_{intra} = 1 - \frac{1}{2m} \sum_i \left( \hat x_i^T \hat c_{y_i} + 1 \right) \tag{2} $$

    The gradient for the features is Eq. 5, or with `scale_free` Eq. 5 times their norms. Arguments,
    reductions and errors are those of `separate_loss`, without the inter-class term.

    Examples:
        >>> centers = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
        >>> features = torch.tensor([[1.0, 0.0], [0.0, -1.0], [1.0, 0.0]])
        >>> intra_class_loss(features, torch.tensor([0, 1, 1]), centers, reduction="none")
        tensor([0.0000, 1.0000, 0.5000])

    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_bool("scale_free", scale_free)
    batch = read_batch(features, target, centers, weight, ignore_index, scale_free=scale_free)
    units, _ = ops.unit(batch.features)
    if batch.target.is_floating_point():
        cosines = (units * _mix(batch, ops.unit(batch.centers)[0])).sum(-1)
    else:
        rows, _ = ops.unit(batch.centers.index_select(0, batch.target))
        cosines = ops.within((units * rows).sum(-1), -1, 1)
    loss = reduce(intra_terms(batch, cosines), batch.mass, None, reduction)
    return loss.reshape(features.shape[:-1]) if reduction == "none" else loss


def inter_class_loss(centers: Tensor, *, separation: Separation = "mean") -> Tensor:
    r"""How similar the centers are to one another.

    ``separation="mean"`` is Eq. 3, in [(C - 2) / (2 (C - 1)), 1]:

    $$
    L_{inter} = \frac{1}{2 |S| (|S| - 1)} \sum_k \sum_{j \ne k}
        \left( \hat c_k^T \hat c_j + 1 \right) \tag{3}
    $$

    Computed from the sum of the unit centers in O(C d) time. The least value is reached by any unit
    centers that sum to zero. ``separation="square"``, which is not in the paper, is in [0, 1], and
    0 only where each pair of centers has the cosine of a simplex, -1 / (C - 1):

    $$
    Q = \frac{1}{C (C - 1) (1 + a)^2} \sum_k \sum_{j \ne k}
        \left( \hat c_k^T \hat c_j + a \right)^2, \quad a = \frac{1}{C - 1}
    $$

    Computed from a Gram matrix of min(C, d) rows, in O(C d min(C, d)) time. Zero centers are in no
    pair of it.

    Args:
        centers: floating point, (C, d) with C >= 2.
        separation: ``"mean"`` or ``"square"``.

    Returns:
        A scalar.

    Raises:
        TypeError: `centers` is not a floating-point tensor.
        ValueError: `centers` is not of shape (C, d) or holds fewer than two classes, or an unknown
            separation.

    Examples:
        >>> centers = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
        >>> inter_class_loss(centers)
        tensor(0.5000)
        >>> inter_class_loss(centers, separation="square")
        tensor(0.2500)

    """
    check_choice("separation", separation, SEPARATIONS)
    check_centers("centers", centers)
    centers = centers.to(_compute_dtype(centers))
    if separation == "square":
        return ops.square(centers)[0]
    none = torch.zeros(0, dtype=torch.long, device=centers.device)
    return ops.compare(centers[:0], centers, none)[1]


def separate_loss(
    features: Tensor,
    target: Tensor,
    centers: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    scale_free: bool = False,
    separation: Separation = "mean",
) -> Tensor:
    r"""The separate loss: intra-class plus inter-class loss.

    $$ L_{sep} = L_{intra} + L_{inter} \tag{4} $$

    Args:
        features: deep features, floating point, `(*, d)`.
        target: class indices, an integer type, `(*)` with values in [0, C) or `ignore_index`; or
            class probabilities, floating point, `(*, C)`: soft labels, mixup, compound labels.
        centers: floating point, (C, d) with C >= 2.
        weight: a factor for each class, floating point, (C,), not negative. A sample's weight is
            its class's, or under probabilities their mean over its classes.
        ignore_index: samples with this class index count for nothing. Unused under probabilities.
        reduction: ``"mean"`` gives the mean of L_intra under the samples' weights, plus L_inter;
            ``"none"`` the weight of each sample times its (L_intra + L_inter), shape `(*)`;
            ``"sum"`` the sum of these. A batch in which no sample counts has L_intra = 0.
        scale_free: multiplies the gradient for each of the features by its norm, held constant, so
            that the pull on a sample does not depend on the size of its features. That is no
            gradient of the loss; values and the gradient for centers stay.
        separation: L_inter as in `inter_class_loss`: ``"mean"``, Eq. 3, or ``"square"``.

    Returns:
        A scalar, or `(*)` for ``reduction="none"``, in float32 or wider.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: sizes do not fit together, fewer than two classes, devices differ, a negative
            weight, or an unknown reduction or separation.
        IndexError: a class index is out of range. On accelerators and in compiled code, where
            reading it would mean to wait, an assertion on the device fails instead.

    Examples:
        >>> centers = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
        >>> features = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
        >>> separate_loss(features, torch.tensor([0, 1]), centers)
        tensor(1.)
        >>> separate_loss(features, torch.tensor([[1.0, 0.0], [0.5, 0.5]]), centers)
        tensor(0.8750)

    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("separation", separation, SEPARATIONS)
    check_bool("scale_free", scale_free)
    form = Form(scale_free, separation)
    if reduction == "mean":
        step = read_fused(features, target, centers, weight, ignore_index, form)
        if step is not None:
            return step.loss
    reading = read(features, target, centers, weight, ignore_index, form)
    loss = reduce(reading.intra, reading.batch.mass, reading.inter, reduction)
    return loss.reshape(features.shape[:-1]) if reduction == "none" else loss


def update_centers(
    features: Tensor,
    target: Tensor,
    centers: Tensor,
    *,
    center_lr: float | None,
    ignore_index: int = -100,
    separation: Separation = "mean",
) -> Tensor:
    r"""The centers after one step of the paper's rule, which is not a gradient step on Eq. 4.

    $$
    D_{intra}(c_j) = \frac{-1}{2m (1 + n_j)} \sum_{i: y_i = j} \left(
        \frac{x_i}{\|x_i\| \|c_j\|} - \frac{(x_i^T c_j) c_j}{\|x_i\| \|c_j\|^3} \right) \tag{6}
    $$

    $$
    D_{inter}(c_j) = \frac{1}{2 |S| (|S| - 1)} \sum_{k \ne j} \left(
        \frac{c_k}{\|c_k\| \|c_j\|} - \frac{(c_k^T c_j) c_j}{\|c_k\| \|c_j\|^3} \right) \tag{7}
    $$

    $$ c_j \leftarrow c_j - \alpha \left( D_{intra}(c_j) + D_{inter}(c_j) \right) \tag{8} $$

    with n_j the number of samples of class j and m that of all. Eq. 7 is half of the gradient of
    Eq. 3, and Eq. 6 the gradient of Eq. 2 over 1 + n_j. Under class probabilities n_j is their sum.
    With ``separation="square"`` half of that one's gradient takes the place of Eq. 7.
    Samples with NaN or infinity in their features count for nothing. A zero center stays zero.

    Args:
        features: as in `separate_loss`.
        target: as in `separate_loss`.
        centers: as in `separate_loss`; left as it is.
        center_lr: alpha, finite and not negative. None takes m / 10, so that by Eq. 6 a center
            turns as far for a sample of its class whatever the size of the batch; and 4 (C - 1) at
            most, as with unit centers a larger one lets Eq. 7 throw their sum past zero.
        ignore_index: as in `separate_loss`.
        separation: as in `inter_class_loss`.

    Returns:
        New centers (C, d) in the type of `centers`, outside of autograd.

    Raises:
        TypeError, ValueError, IndexError: as in `separate_loss`; ValueError also for a
            `center_lr` that is negative or not finite.

    Examples:
        >>> centers = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> features = torch.tensor([[1.0, 1.0]])
        >>> update_centers(features, torch.tensor([0]), centers, center_lr=1.0)
        tensor([[ 1.0000, -0.0732],
                [-0.2500,  1.0000]])

    """
    check_center_lr(center_lr)
    check_choice("separation", separation, SEPARATIONS)
    form = Form(separation=separation)
    with torch.no_grad():
        step = read_fused(features, target, centers, None, ignore_index, form)
        if step is not None:
            moved = centers.clone()
            step.move_(moved, center_lr, start=False)
            return moved
        reading = read(features, target, centers, None, ignore_index, form)
        moved = torch.empty_like(reading.batch.centers)
        move_centers_(moved, reading, center_lr)
        return moved.to(centers.dtype)


# Shared with the module, not public.


class Batch(NamedTuple):
    """Arguments that were checked and brought to one type and one leading dimension."""

    features: Tensor  # (N, d)
    target: Tensor  # (N,) or (N, C)
    counted: Tensor | None  # (N,), 1 where a sample counts and 0 where not; None: all count
    mass: Tensor | None  # (N,), the weight of each sample, 0 where it does not count; None: all 1
    centers: Tensor  # (C, d)
    weight: Tensor | None  # (C,)


class Form(NamedTuple):
    """What of the loss differs from the paper."""

    scale_free: bool = False
    separation: Separation = "mean"


class Reading(NamedTuple):
    """What one reading of a batch and of the centers yields."""

    batch: Batch
    intra: Tensor  # (N,), the summands of Eq. 2 times mass
    inter: Tensor  # scalar, Eq. 3
    units: Tensor  # (N, d), the features' directions
    directions: Tensor  # of the centers: (N, d) under class indices, of all (C, d) otherwise
    cosines: Tensor  # (N,), of the two under class indices, of mixed directions otherwise
    norms: Tensor  # (C,), the centers' norms
    total: Tensor  # (d,), the sum of the centers' directions
    gram: Tensor | None  # of the centers' directions, for the squared separation


def read_batch(
    features: Tensor,
    target: Tensor,
    centers: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    num_classes: int | None = None,
    *,
    scale_free: bool = False,
) -> Batch:
    """Checks and brings together; `num_classes` where the centers are a part of them."""
    num_classes = _check(features, target, centers, weight, ignore_index, num_classes)
    feature_dim = centers.shape[1]

    dtype = _compute_dtype(features, centers)
    features = features.to(dtype)
    features = features if features.ndim == 2 else features.reshape(-1, feature_dim)
    features = ops.scale_free(features) if scale_free else features
    weight = None if weight is None else weight.to(dtype)
    counted = mass = None
    if target.is_floating_point():
        target = target.to(dtype).reshape(-1, num_classes)
        mass = target.sum(-1) if weight is None else ops.matmul(target, weight)
    else:
        target, kept = split_ignored(target.reshape(-1), num_classes, ignore_index)
        if kept is not None:
            counted = mass = kept.to(dtype)
            features = features.where(kept.unsqueeze(-1), 0)
        if weight is not None:
            mass = weight.index_select(0, target)
            mass = mass if counted is None else mass * counted
    return Batch(features, target, counted, mass, centers.to(dtype), weight)


def _check(
    features: Tensor,
    target: Tensor,
    centers: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    num_classes: int | None = None,
) -> int:
    check_int("ignore_index", ignore_index)
    if num_classes is None:
        check_centers("centers", centers)
        num_classes = centers.shape[0]
    check_batch(features, target, num_classes)
    check_beside_centers(features, centers, weight)
    return num_classes


def read_fused(
    features: Tensor,
    target: Tensor,
    centers: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    form: Form,
) -> "Step | None":
    """What `read` and the mean reduction yield, by fused kernels; None where they do not serve."""
    if weight is not None or form.separation != "mean" or not ops.may_fuse(centers):
        return None
    _check(features, target, centers, weight, ignore_index)
    kernels = ops.kernels_for(features, target, centers)
    if kernels is None:
        return None
    features = features.reshape(-1, centers.shape[1])
    if form.scale_free:
        # In the wider type, as a gradient in half precision may be too small before it is scaled.
        features = ops.scale_free(features.to(_compute_dtype(features, centers)))
    step: Step = kernels.read(features, target.reshape(-1), centers, ignore_index)
    return step


def read(
    features: Tensor,
    target: Tensor,
    centers: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    form: Form,
) -> Reading:
    batch = read_batch(features, target, centers, weight, ignore_index, scale_free=form.scale_free)
    square = ops.square(batch.centers) if form.separation == "square" else None
    if batch.target.is_floating_point():
        units, _ = ops.unit(batch.features)
        directions, norms = ops.unit(batch.centers)
        cosines = (units * _mix(batch, directions)).sum(-1)
        if square is None:
            total = directions.sum(0)
            inter = ops.inter(total, norms)
    elif square is None:
        cosines, inter, total, units, directions, _, norms = ops.compare(
            batch.features, batch.centers, batch.target
        )
    else:
        units, _ = ops.unit(batch.features)
        directions, _ = ops.unit(batch.centers.index_select(0, batch.target))
        cosines = ops.within((units * directions).sum(-1), -1, 1)
    gram = None
    if square is not None:
        inter, norms, total, gram = square
    intra = intra_terms(batch, cosines)
    return Reading(batch, intra, inter, units, directions, cosines, norms, total, gram)


def reduce(
    intra: Tensor, mass: Tensor | None, inter: Tensor | None, reduction: Reduction
) -> Tensor:
    """The loss from the summands of Eq. 2 and, where given, Eq. 3 beside each of them."""
    if reduction == "mean":
        if mass is None:
            mean = intra.mean() if intra.shape[0] else intra.sum()
        else:
            total = mass.sum()
            mean = intra.sum() / total.masked_fill(total == 0, 1)
        return mean if inter is None else mean + inter
    if inter is not None:
        intra = intra + (inter if mass is None else mass * inter)
    return intra if reduction == "none" else intra.sum()


Summed = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From class sums (C, d) and counts (C,) of a part of the batch to those of the whole."""


def move_centers_(
    centers: Tensor,
    reading: Reading,
    center_lr: float | None,
    *,
    start: bool = False,
    summed: Summed | None = None,
) -> None:
    """Eq. 8 on the centers that were read, in place, or from these into a tensor like them.

    Samples that are not finite are left out; `start` puts zero centers on their samples. `summed`
    is for a batch of which other processes read the rest.
    """
    target, norms, total, gram = reading.batch.target, reading.norms, reading.total, reading.gram
    read = reading.batch.centers
    source = None if centers is read else read
    units, cosines, counted = finite(reading.units, reading.cosines, reading.batch.counted)
    by_sums = summed or target.is_floating_point() or ops.fewer_classes(centers, target)
    if by_sums:
        sums, count = ops.class_sums(units, target, counted, norms.shape[0])
        sums, count = (sums, count) if summed is None else summed(sums, count)
    batch_size: Tensor | float = len(target)
    if summed or counted is not None or target.is_floating_point():
        batch_size = (count if by_sums or counted is None else counted).sum()
    rate = ops.rate_for(center_lr, batch_size, len(centers))
    matrix: Tensor | None = None
    if gram is not None:
        push, matrix = ops.push_of_square(total, gram, len(centers), rate)
        push, matrix = ops.by_dims(push, matrix, read, norms)
    elif by_sums:
        push = ops.push_of(total, len(centers), rate)
    if by_sums:
        if source is not None:
            centers.copy_(source)
        ops.move_by_sums_(
            centers, norms, push, sums, count,
            rate=rate, start=start, batch_size=batch_size, matrix=matrix,
        )  # fmt: skip
        return
    if gram is None:
        ops.push_apart_(centers, norms, total, rate, source=source)
    else:
        ops.push_apart_by_(centers, norms, push, matrix, source)
    ops.pull_by_index_(
        centers,
        units,
        target,
        counted,
        rows=reading.directions,
        cosines=cosines,
        norms=norms,
        rate=rate,
        start=start,
        batch_size=batch_size,
    )


def finite(
    units: Tensor, cosines: Tensor, counted: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Directions, cosines and counts without the samples that are not finite."""
    if can_read(cosines) and math.isfinite(cosines.sum().item()):
        return units, cosines, counted
    kept = cosines.isfinite()
    counted = kept.to(units.dtype) if counted is None else counted.where(kept, 0)
    return units.where(kept.unsqueeze(-1), 0), cosines.where(kept, 0), counted


def intra_terms(batch: Batch, cosines: Tensor) -> Tensor:
    """The summands of Eq. 2 times mass."""
    if batch.target.is_floating_point() and batch.mass is not None:
        return ops.within((batch.mass - cosines) / 2, 0, batch.mass)
    intra = torch.rsub(cosines, 0.5, alpha=0.5)
    return intra if batch.mass is None else intra * batch.mass


def _mix(batch: Batch, center_units: Tensor) -> Tensor:
    """Each sample's mean of unit centers under its class probabilities and the class weights."""
    if batch.weight is not None:
        center_units = center_units * batch.weight.unsqueeze(-1)
    return ops.matmul(batch.target, center_units)


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
