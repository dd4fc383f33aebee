"""One step: both terms of Eq. 4, their gradients in closed form, and the update of the centers."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from separate_loss._batch import Batch, Options, check_arguments, prepare_batch
from separate_loss._centers import CenterStatistics, centers_gradient, read_centers, update_centers_
from separate_loss._distributed import all_reduce_sums
from separate_loss._ops import full_precision, read_norms
from separate_loss._terms import Number, inter_class, intra_class, normalize, reduce, scale_gradient
from separate_loss._torch import backward_keeps_graph, under_vmap
from separate_loss._tracing import in_eager
from separate_loss._triton.backend import kernels_for

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from separate_loss._triton.step import KernelWork


class Samples(NamedTuple):
    """The samples beside the centers of their classes."""

    units: Tensor  # (N, d)
    norms: Tensor  # (N, 1)
    usable: Tensor | None  # (N, 1), mask of the samples that have a direction; None: all
    target_centers: Tensor  # (N, d), unit centers times the sample weights
    cosines: Tensor  # (N,), times the sample weights


class Work(NamedTuple):
    """What the gradients and the update need of a step by PyTorch's operators."""

    batch: Batch
    samples: Samples
    statistics: CenterStatistics
    total_weight: Number

    def held(self, of_centers: bool) -> "Work":
        """What the backward pass needs; without the centers' gradient they may change before."""
        if of_centers:
            return self
        batch = self.batch._replace(centers=self.batch.features.new_empty(0))
        statistics = self.statistics._replace(units=None, gram=None)
        return self._replace(batch=batch, statistics=statistics)

    def plain(self) -> tuple[Batch, Tensor]:
        """The batch and the expected unit centers (N, d), for the plain formula."""
        return self.batch, self.samples.target_centers

    def features_gradient(self, grad: Tensor) -> Tensor:
        """Eq. 5 (N, d), by the gradient for the loss, a scalar or (N,).

        In the simplex form it is also times the norms of the features.
        """
        samples, factor = self.samples, self._each(grad)
        target_centers = samples.target_centers
        if samples.usable is not None:
            target_centers = target_centers.where(samples.usable, 0)
        if self.batch.options.form == "paper":
            factor = factor / samples.norms
        cosines = samples.cosines.unsqueeze(-1)
        across = torch.addcmul(target_centers, samples.units, cosines, value=-1)
        return across.mul_(factor)

    def centers_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of both terms for the centers (C, d)."""
        _, target, _, sample_weight, centers, weight, options, _ = self.batch
        statistics, smoothing = self.statistics, options.label_smoothing
        num_classes = statistics.num_classes
        sums = rows = self.samples.units * self._each(grad)
        index: Tensor | None = None
        if target.is_floating_point():
            sums = target.mT @ rows
        elif smoothing == 0 and num_classes > len(rows):
            index = target
        else:
            sums = rows.new_zeros(num_classes, rows.shape[1]).index_add_(0, target, rows)
        if smoothing > 0:
            sums.mul_(1 - smoothing).add_(rows.sum(0), alpha=smoothing / num_classes)
        if weight is not None:
            weight = weight if index is None else weight.index_select(0, index)
            sums.mul_(weight.unsqueeze(-1))
        of_inter = grad
        if options.reduction == "sum":
            of_inter = grad * (len(rows) if sample_weight is None else sample_weight.sum())
        elif options.reduction == "none":
            of_inter = grad.sum() if sample_weight is None else grad.dot(sample_weight)
        return centers_gradient(centers, statistics, sums, of_inter, index)

    def _each(self, grad: Tensor) -> Tensor:
        """The gradient for the samples' cosines, (N, 1) or (1,)."""
        mean = self.batch.options.reduction == "mean"
        return grad.unsqueeze(-1) / (-2 * (self.total_weight if mean else 1))

    def update_(self, centers: Tensor, center_lr: float | None, *, start_zeros: bool) -> None:
        """Eq. 8, in place."""
        (_, target, valid, *_, group), usable = self.batch, self.samples.usable
        known = group is None and valid is None and usable is None and target.ndim == 1
        # `batch.centers` is a copy if the step computed in another type than the centers'.
        updated = centers if centers.dtype == self.batch.centers.dtype else self.batch.centers
        update_centers_(
            updated, self.statistics, *update_sums(self, centers.dtype), center_lr=center_lr,
            num_samples=max(1, len(target)) if known else None, start_zeros=start_zeros,
        )  # fmt: skip
        if updated is not centers:
            centers.copy_(updated)


class Step(NamedTuple):
    """The loss of a batch, and what its gradients and the update need."""

    loss: Tensor
    intra: Tensor  # the mean of Eq. 2
    inter: Tensor
    num_centers: Tensor  # those that are not zero
    work: "Work | KernelWork"  # by operators or by kernels

    def update_(
        self, centers: Tensor, center_lr: float | None, *, start_zeros: bool = False
    ) -> None:
        """Applies Eq. 8 to the centers of the step, or to a copy of them, in place."""
        with torch.no_grad(), full_precision(centers.device.type):
            self.work.update_(centers, center_lr, start_zeros=start_zeros)


def run_step(
    features: Tensor, target: Tensor, centers: Tensor, options: Options,
    group: "ProcessGroup | None" = None, choose: Callable[..., Any] = kernels_for,
) -> Step:  # fmt: skip
    """Checks the arguments and computes both terms, by operators or by kernels.

    With a process group, the update sums over the samples of all its processes. `choose` returns
    the module of the kernels, or None.
    """
    check_arguments(features, target, centers, options)
    kernels, differentiable = None, False
    if group is None:
        kernels = choose(features, target, centers, options, run_step)
    with full_precision(centers.device.type):
        if kernels is not None:
            rows = features.reshape(-1, centers.shape[1])
            step = Step(*kernels.read(rows, target.reshape(-1), centers, options))
        else:
            batch = prepare_batch(features, target, centers, options, group=group)
            weight = batch.weight
            learned = batch.target.requires_grad or (weight is not None and weight.requires_grad)
            differentiable = learned or not in_eager()
            with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
                statistics = read_centers(batch.centers, options.form, differentiable)
                samples = compare(batch, expected_centers(batch, statistics), differentiable)
                step = evaluate(batch, samples, statistics)
        loss = step.loss if differentiable else with_gradients(step)
    loss = loss.reshape(features.shape[:-1]) if options.reduction == "none" else loss
    return Step(loss, step.intra, step.inter, step.num_centers, step.work)


def compare(batch: Batch, target_centers: Tensor, differentiable: bool = False) -> Samples:
    """The cosines of samples and centers; differentiable to any order, or without a graph."""
    if differentiable:
        simplex = batch.options.form == "simplex"
        units, norms = normalize(scale_gradient(batch.features) if simplex else batch.features)
        norms = norms.unsqueeze(-1)
        usable: Tensor | None = norms.isfinite()
    else:
        norms, usable = read_norms(batch.features)
        units = batch.features / norms
    cosines = (units * target_centers).sum(-1)
    return Samples(units, norms, usable, target_centers, cosines)


def evaluate(batch: Batch, samples: Samples, statistics: CenterStatistics) -> Step:
    """Eq. 4, from its parts."""
    _, _, center_sum, gram, num_centers, num_classes = statistics
    intra = intra_class(samples.cosines, batch.sample_weight)
    inter = inter_class(center_sum, gram, num_centers, num_classes)
    loss, mean, total = reduce(intra, batch.sample_weight, inter, batch.options.reduction)
    if not isinstance(num_centers, Tensor):
        num_centers = torch.scalar_tensor(num_centers, dtype=torch.long)
    return Step(loss, mean, inter, num_centers.long(), Work(batch, samples, statistics, total))


def intra_loss(batch: Batch, target_centers: Tensor) -> Tensor:
    """Eq. 2 alone, differentiable to any order."""
    intra = intra_class(compare(batch, target_centers, True).cosines, batch.sample_weight)
    return reduce(intra, batch.sample_weight, 0.0, batch.options.reduction)[0]


def expected_centers(batch: Batch, statistics: CenterStatistics) -> Tensor:
    """The unit center of each sample's class (N, d), times the weight of the sample.

    Under class probabilities and label smoothing, the sum of the unit centers of all classes times
    their probabilities and weights: (1 - e) c^_y + (e / C) s for smoothing e without weights.
    """
    centers, target, weight = batch.centers, batch.target, batch.weight
    smoothing, num_classes = batch.options.label_smoothing, statistics.num_classes
    if batch.target.is_floating_point():
        expected = statistics.weighted_sum(target, centers, weight)
    else:
        expected = statistics.unit_rows(centers, target)
        if weight is not None:
            expected = expected * weight.index_select(0, target).unsqueeze(-1)
    if smoothing == 0:
        return expected
    uniform = statistics.center_sum
    if weight is not None:
        uniform = statistics.weighted_sum(weight, centers)
    return torch.add((1 - smoothing) * expected, uniform, alpha=smoothing / num_classes)


class _ClosedForm(Function):
    """The gradients of a step; those of higher order by the plain formulas."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, centers: Tensor, step: Step) -> Tensor:
        of_centers, batch = ctx.needs_input_grad[1], step.work.batch
        ctx.work = step.work.held(of_centers)
        # What the caller may change in place, which autograd then refuses.
        ctx.save_for_backward(features, batch.target, batch.weight, centers if of_centers else None)
        return step.loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        _ = ctx.saved_tensors  # raises if one was changed, or if the graph is freed
        work, needed = ctx.work, ctx.needs_input_grad[:2]
        if not backward_keeps_graph():
            ctx.work = None
        if torch.is_grad_enabled() or under_vmap(grad):
            return (*_differentiable_gradients(work, grad, needed), None)
        with full_precision(grad.device.type):
            return (
                work.features_gradient(grad) if needed[0] else None,
                work.centers_gradient(grad) if needed[1] else None,
                None,
            )


def with_gradients(step: Step) -> Tensor:
    """The loss of a step with a graph, if features or centers need one."""
    features, centers = step.work.batch.features, step.work.batch.centers
    if not (torch.is_grad_enabled() and (features.requires_grad or centers.requires_grad)):
        return step.loss
    apply: Any = _ClosedForm.apply
    loss: Tensor = apply(features, centers, step)
    return loss


@torch.enable_grad()
def _differentiable_gradients(
    work: "Work | KernelWork", grad: Tensor, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    (batch, expected), (of_features, of_centers) = work.plain(), needed
    if of_centers:
        statistics = read_centers(batch.centers, batch.options.form, differentiable=True)
        samples = compare(batch, expected_centers(batch, statistics), differentiable=True)
        loss = evaluate(batch, samples, statistics).loss
    else:
        loss = intra_loss(batch, expected)
    inputs = [work.batch.features] * of_features + [work.batch.centers] * of_centers
    found = list(torch.autograd.grad(loss, inputs, grad, create_graph=True))
    return found.pop(0) if of_features else None, found.pop() if of_centers else None


def update_sums(work: Work, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums of unit features, numbers of samples in them, and their classes, for the update.

    A sum is of one sample if there are many classes, else of a class, over all processes.
    """
    batch, samples, statistics, _ = work
    target, num_classes, group = batch.target, statistics.num_classes, batch.group
    probabilities = target.is_floating_point()
    units, valid = finite_samples(batch, samples)
    if group is not None:
        # Packed at once, so that there is one tensor of the size of the centers.
        packed = units.new_zeros(num_classes + 1, units.shape[1] + 1)
        if probabilities:
            packed[:-1, :-1], packed[:-1, -1] = probability_sums(units, target, valid, statistics)
        else:
            packed.index_add_(0, target, torch.cat([units, valid.unsqueeze(-1)], dim=-1))
        return *all_reduce_sums(group, dtype, packed), None
    if probabilities:
        return *probability_sums(units, target, valid, statistics), None
    if torch.compiler.is_compiling() or num_classes > len(units):
        return units, valid, target
    return *class_sums(units, target, valid, num_classes), None


def finite_samples(batch: Batch, samples: Samples) -> tuple[Tensor, Tensor]:
    """Unit features and a mask (N,), both 0 for samples that are ignored or not finite."""
    units = samples.units
    valid = units.new_ones(len(units)) if batch.valid is None else batch.valid
    if samples.usable is None:
        return units, valid
    finite = samples.cosines.isfinite()
    return units.where(finite.unsqueeze(-1), 0), valid.where(finite, 0)


def class_sums(
    units: Tensor, target: Tensor, valid: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """For each class the sum of its unit features (C, d) and the number of its samples (C,)."""
    sums = units.new_zeros(num_classes, units.shape[1]).index_add_(0, target, units)
    return sums, units.new_zeros(num_classes).index_add_(0, target, valid)


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
        target = target.masked_fill(less_probable & statistics.norms.mT.isinf(), 0)
    return (target.mT @ units).nan_to_num(0, 0, 0), counts.nan_to_num(0, 0, 0)
