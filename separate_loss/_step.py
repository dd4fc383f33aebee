"""One step: both terms of Eq. 4, their gradients in closed form, and the update of the centers."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from separate_loss._batch import Batch, Options, check_arguments, prepare_batch
from separate_loss._centers import (
    CenterStatistics,
    centers_gradient,
    read_centers,
    update_centers_,
    weighted_units,
)
from separate_loss._distributed import all_reduce_sums
from separate_loss._ops import full_precision, read_norms
from separate_loss._terms import (
    Number,
    inter_class,
    intra_class,
    normalize,
    reduce,
    scale_gradient,
)
from separate_loss._torch import under_vmap
from separate_loss._tracing import in_eager
from separate_loss._triton.backend import kernels_for

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from separate_loss._triton.step import KernelWork


class Samples(NamedTuple):
    """The samples beside the centers of their classes."""

    units: Tensor  # (N, d)
    norms: Tensor  # (N,)
    usable: Tensor | None  # mask of the samples that have a direction; None: all
    target_centers: Tensor  # (N, d), unit centers times the sample weights
    cosines: Tensor  # (N,), times the sample weights


class Work(NamedTuple):
    """What the gradients and the update need of a step by PyTorch's operators."""

    batch: Batch
    samples: Samples
    statistics: CenterStatistics
    total_weight: Number

    @property
    def features(self) -> Tensor:
        """The features that the gradient is for."""
        return self.batch.features

    @property
    def centers(self) -> Tensor:
        """The centers that the gradient is for."""
        return self.batch.centers

    def held(self, features: Tensor, centers: Tensor | None) -> "Work":
        """What the backward pass needs; without the centers' gradient they may change before."""
        batch, statistics = self.batch._replace(features=features), self.statistics
        if centers is None:
            centers, statistics = features.new_empty(0), statistics._replace(units=None, gram=None)
        return self._replace(batch=batch._replace(centers=centers), statistics=statistics)

    def plain(self) -> tuple[Batch, Tensor]:
        """The batch and the expected unit centers (N, d), for the plain formula."""
        return self.batch, self.samples.target_centers

    def features_gradient(self, grad: Tensor) -> Tensor:
        """Eq. 5 (N, d), by the gradient for the loss, a scalar or (N,).

        In the simplex form it is also times the norms of the features.
        """
        batch, samples, _, _ = self
        target_centers, factor = samples.target_centers, self._each(grad)
        if samples.usable is not None:
            target_centers = target_centers.where(samples.usable.unsqueeze(-1), 0)
        if batch.options.form == "paper":
            factor = factor / samples.norms
        cosines = samples.cosines.unsqueeze(-1)
        across = torch.addcmul(target_centers, samples.units, cosines, value=-1)
        return across.mul_(factor.unsqueeze(-1))

    def centers_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of both terms for the centers (C, d), by that for the loss."""
        batch, samples, statistics, _ = self
        weight, smoothing = batch.options.weight, batch.options.label_smoothing
        rows = samples.units * self._each(grad).unsqueeze(-1)
        index: Tensor | None = None
        if batch.target.is_floating_point():
            sums = batch.target.mT @ rows
        elif smoothing == 0 and statistics.num_classes > len(rows):
            index = batch.target
            sums = rows if weight is None else rows * weight.index_select(0, index).unsqueeze(-1)
        else:
            sums = rows.new_zeros(statistics.num_classes, rows.shape[1])
            sums.index_add_(0, batch.target, rows)
        if smoothing > 0:
            sums.mul_(1 - smoothing).add_(rows.sum(0), alpha=smoothing / statistics.num_classes)
        if weight is not None and index is None:
            sums.mul_(weight.unsqueeze(-1))
        of_inter, sample_weight = grad, batch.sample_weight
        if batch.options.reduction == "sum":
            of_inter = grad * (len(rows) if sample_weight is None else sample_weight.sum())
        elif batch.options.reduction == "none":
            of_inter = grad.sum() if sample_weight is None else grad.dot(sample_weight)
        return centers_gradient(batch.centers, statistics, sums, of_inter, index)

    def _each(self, grad: Tensor) -> Tensor:
        """The gradient for the samples' cosines, (N,) or a scalar."""
        factor = grad * -0.5
        return factor / self.total_weight if self.batch.options.reduction == "mean" else factor

    def update_(
        self, centers: Tensor, center_lr: float | None, *, start_zeros: bool,
        group: "ProcessGroup | None" = None,
    ) -> None:  # fmt: skip
        """Eq. 8, in place."""
        # `batch.centers` is a copy if the step computed in another type than the centers'.
        in_place = centers.dtype == self.batch.centers.dtype
        updated = centers if in_place else self.batch.centers
        with full_precision(centers.device.type):
            update_centers_(
                updated,
                self.statistics,
                *update_sums(self, centers.dtype, group),
                center_lr=center_lr,
                start_zeros=start_zeros,
            )
            if not in_place:
                centers.copy_(updated)


class Step(NamedTuple):
    """The loss of a batch, and what its gradients and the update need."""

    loss: Tensor
    intra: Tensor  # the mean of Eq. 2
    inter: Tensor
    num_centers: Tensor  # those that are not zero
    work: "Work | KernelWork"  # by operators or by kernels
    group: "ProcessGroup | None" = None

    def update_(
        self, centers: Tensor, center_lr: float | None, *, start_zeros: bool = False
    ) -> None:
        """Applies Eq. 8 to the centers of the step, or to a copy of them, in place."""
        # No kernels run with a group.
        group: Any = {} if self.group is None else {"group": self.group}
        with torch.no_grad():
            self.work.update_(centers, center_lr, start_zeros=start_zeros, **group)


def run_step(
    features: Tensor,
    target: Tensor,
    centers: Tensor,
    options: Options,
    group: "ProcessGroup | None" = None,
) -> Step:
    """Checks the arguments and computes both terms.

    With a process group, the update sums over the samples of all its processes.
    """
    check_arguments(features, target, centers, options)
    kernels = None
    if group is None:
        kernels = kernels_for(features, target, centers, options, compute)
    step = compute(features, target, centers, options, kernels)
    loss = step.loss.reshape(features.shape[:-1]) if options.reduction == "none" else step.loss
    return Step(loss, step.intra, step.inter, step.num_centers, step.work, group)


def compute(
    features: Tensor, target: Tensor, centers: Tensor, options: Options, kernels: Any = None
) -> Step:
    """Computes both terms by a module of kernels, or by operators."""
    if kernels is not None:
        features = features.reshape(-1, centers.shape[1])
        step = Step(*kernels.read(features, target.reshape(-1), centers, options))
        return step._replace(loss=with_gradients(step))
    with full_precision(centers.device.type):
        batch = prepare_batch(features, target, centers, options)
        weight = batch.options.weight
        differentiable = not in_eager() or batch.target.requires_grad
        differentiable = differentiable or (weight is not None and weight.requires_grad)
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            simplex = options.form == "simplex"
            statistics = read_centers(batch.centers, simplex=simplex, differentiable=differentiable)
            target_centers = expected_centers(batch, statistics)
            samples = compare(batch, target_centers, differentiable=differentiable)
            step = combine(batch, samples, statistics)
        if not differentiable:
            step = step._replace(loss=with_gradients(step))
    return step


def compare(batch: Batch, target_centers: Tensor, *, differentiable: bool = False) -> Samples:
    """The cosines of samples and centers."""
    if differentiable:
        simplex = batch.options.form == "simplex"
        units, norms = normalize(scale_gradient(batch.features) if simplex else batch.features)
        usable: Tensor | None = norms.isfinite()
    else:
        norms, usable = read_norms(batch.features)
        units = batch.features / norms.unsqueeze(-1)
    cosines = (units * target_centers).sum(-1)
    return Samples(units, norms, usable, target_centers, cosines)


def combine(batch: Batch, samples: Samples, statistics: CenterStatistics) -> Step:
    """Eq. 4, from its parts."""
    weight, reduction = batch.sample_weight, batch.options.reduction
    _, _, center_sum, gram, num_centers, num_classes = statistics
    intra = intra_class(samples.cosines, 1.0 if weight is None else weight)
    inter = inter_class(center_sum, gram, num_centers, num_classes)
    loss, mean, total = reduce(intra, weight, inter, reduction)
    work = Work(batch, samples, statistics, total)
    return Step(loss, mean, inter, torch.as_tensor(num_centers).long(), work)


def intra_loss(batch: Batch, target_centers: Tensor) -> Tensor:
    """Eq. 2 alone, differentiable to any order."""
    cosines = compare(batch, target_centers, differentiable=True).cosines
    weight, reduction = batch.sample_weight, batch.options.reduction
    intra = intra_class(cosines, 1.0 if weight is None else weight)
    return reduce(intra, weight, 0.0, reduction)[0]


def expected_centers(batch: Batch, statistics: CenterStatistics) -> Tensor:
    """The unit center of each sample's class (N, d), times the weight of the sample.

    Under class probabilities and label smoothing, the sum of the unit centers of all classes times
    their probabilities and weights: (1 - e) c^_y + (e / C) s for smoothing e without weights.
    """
    centers, target, weight = batch.centers, batch.target, batch.options.weight
    smoothing, num_classes = batch.options.label_smoothing, statistics.num_classes
    if batch.target.is_floating_point():
        expected = weighted_units(target, centers, statistics, weight)
    else:
        expected = statistics.unit_rows(centers, target)
        if weight is not None:
            expected = expected * weight.index_select(0, target).unsqueeze(-1)
    if smoothing == 0:
        return expected
    uniform = statistics.center_sum
    if weight is not None:
        uniform = weighted_units(weight, centers, statistics, None)
    return torch.add((1 - smoothing) * expected, uniform, alpha=smoothing / num_classes)


class _ClosedForm(Function):
    """The gradients of a step; those of higher order by the plain formulas."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, centers: Tensor, step: Step) -> Tensor:
        work = step.work.held(features, centers if ctx.needs_input_grad[1] else None)
        tensors: list[Tensor] = []
        ctx.packed = _pack(work, tensors)
        ctx.save_for_backward(*tensors)
        return step.loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        work = _unpack(ctx.packed, iter(ctx.saved_tensors))
        of_features, of_centers, _ = ctx.needs_input_grad
        if torch.is_grad_enabled() or under_vmap(grad):
            return (*_differentiable_gradients(work, grad, of_features, of_centers), None)
        with full_precision(grad.device.type):
            return (
                work.features_gradient(grad) if of_features else None,
                work.centers_gradient(grad) if of_centers else None,
                None,
            )


def with_gradients(step: Step) -> Tensor:
    """The loss of a step with a graph, if features or centers need one."""
    features, centers = step.work.features, step.work.centers
    assert centers is not None
    if not (torch.is_grad_enabled() and (features.requires_grad or centers.requires_grad)):
        return step.loss
    apply: Any = _ClosedForm.apply
    loss: Tensor = apply(features, centers, step)
    return loss


@torch.enable_grad()
def _differentiable_gradients(
    work: "Work | KernelWork", grad: Tensor, of_features: bool, of_centers: bool
) -> tuple[Tensor | None, Tensor | None]:
    batch, target_centers = work.plain()
    if of_centers:
        simplex = batch.options.form == "simplex"
        statistics = read_centers(batch.centers, simplex=simplex, differentiable=True)
        target_centers = expected_centers(batch, statistics)
        loss = combine(batch, compare(batch, target_centers, differentiable=True), statistics).loss
    else:
        loss = intra_loss(batch, target_centers)
    pairs = (work.features, of_features), (work.centers, of_centers)
    inputs = [one for one, need in pairs if need and one is not None]
    found = list(torch.autograd.grad(loss, inputs, grad, create_graph=True))
    return found.pop(0) if of_features else None, found.pop() if of_centers else None


def update_sums(
    work: Work, dtype: torch.dtype, group: "ProcessGroup | None"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums of unit features, numbers of samples in them, and their classes, for the update.

    A sum is of one sample if there are many classes, else of a class, over all processes.
    """
    batch, statistics = work.batch, work.statistics
    num_classes = statistics.num_classes
    units, valid = finite_samples(batch, work.samples)
    few_classes = not torch.compiler.is_compiling() and num_classes <= len(units)
    if batch.target.is_floating_point():
        sums, counts = probability_sums(units, batch.target, valid, statistics)
    elif few_classes and group is None:
        sums, counts = class_sums(units, batch.target, valid, num_classes)
    elif group is None:
        return units, valid, batch.target
    if group is not None:
        # Packed at once, so that there is one tensor of the size of the centers.
        packed = units.new_zeros(num_classes + 1, units.shape[1] + 1)
        if batch.target.is_floating_point():
            packed[:-1, :-1], packed[:-1, -1] = sums, counts
        else:
            packed.index_add_(0, batch.target, torch.cat([units, valid.unsqueeze(-1)], dim=-1))
        sums, counts = all_reduce_sums(group, torch.promote_types(dtype, torch.float32), packed)
    return sums, counts, None


def finite_samples(batch: Batch, samples: Samples) -> tuple[Tensor, Tensor]:
    """Unit features and a mask (N,), both 0 for samples that are ignored or not finite."""
    units, valid = samples.units, batch.valid
    if valid is None:
        valid = units.new_ones(len(units))
    if samples.usable is None:
        return units, valid
    finite = samples.cosines.isfinite()
    return units.where(finite.unsqueeze(-1), 0), valid.where(finite, 0)


def class_sums(
    units: Tensor, target: Tensor, valid: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """For each class the sum of its unit features (C, d) and the number of its samples (C,)."""
    sums = units.new_zeros(num_classes, units.shape[1]).index_add(0, target, units)
    return sums, units.new_zeros(num_classes).index_add(0, target, valid)


def probability_sums(
    units: Tensor, target: Tensor, valid: Tensor, statistics: CenterStatistics
) -> tuple[Tensor, Tensor]:
    """`class_sums` by class probabilities.

    A class whose center is zero sums over the samples that have no more probable class. A class
    with a probability that is not finite has neither sum nor number.
    """
    counts = valid @ target
    if statistics.may_hold_zeros():
        less_probable = target < target.amax(-1, keepdim=True)
        target = target.masked_fill(less_probable & statistics.norms.isinf(), 0)
    return (target.mT @ units).nan_to_num(0, 0, 0), counts.nan_to_num(0, 0, 0)


def _pack(part: Any, tensors: list[Tensor]) -> Any:
    """Nested tuples with `_HOLE` in place of their tensors, which go into a list for autograd."""
    if isinstance(part, Tensor):
        tensors.append(part)
        return _HOLE
    if not isinstance(part, tuple):
        return part
    parts = [_pack(one, tensors) for one in part]
    return type(part)(*parts) if hasattr(part, "_fields") else tuple(parts)


def _unpack(part: Any, tensors: Iterator[Tensor]) -> Any:
    """The nested tuples with their tensors again."""
    if part is _HOLE:
        return next(tensors)
    if not isinstance(part, tuple):
        return part
    parts = [_unpack(one, tensors) for one in part]
    return type(part)(*parts) if hasattr(part, "_fields") else tuple(parts)


_HOLE = object()
