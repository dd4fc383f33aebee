"""One step: both terms of Eq. 4, and the update of the centers by Eq. 8."""

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from separate_loss._batch import Batch, Options, check_arguments, prepare_batch
from separate_loss._checks import Reduction
from separate_loss._distributed import all_reduce_sums
from separate_loss._ops import (
    clamp_value,
    gather_centers,
    gram_matrix,
    gram_of_centers,
    matmul,
    normalize,
)
from separate_loss._separation import count_centers, inter_class
from separate_loss._tracing import has_values
from separate_loss._triton.backend import kernels_for
from separate_loss._update import CenterStatistics, update_centers_

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Step(Protocol):
    """What `run_step` returns, whether PyTorch's operators or the Triton kernels ran it."""

    @property
    def loss(self) -> Tensor:
        """The reduced loss."""

    @property
    def intra(self) -> Tensor:
        """The mean of Eq. 2, a scalar."""

    @property
    def inter(self) -> Tensor:
        """The separation of the centers, a scalar."""

    @property
    def num_centers(self) -> Tensor:
        """The number of centers that are not zero, a scalar."""

    def update_(
        self, centers: Tensor, center_lr: float | None, *, start_zeros: bool = False
    ) -> None:
        """Applies Eq. 8 to the centers of the step, or to a copy of them, in place."""


def run_step(
    features: Tensor,
    target: Tensor,
    centers: Tensor,
    options: Options,
    group: "ProcessGroup | None" = None,
) -> Step:
    """Validates the arguments and computes both terms.

    With a process group, the update sums over the samples of all its processes.
    """
    check_arguments(features, target, centers, options)
    kernels = kernels_for(features, target, centers, options) if group is None else None
    if kernels is not None:
        step: Step = kernels.run_step(features, target, centers, options)
        return step
    batch = prepare_batch(features, target, centers, options)
    # Many samples of few classes: all unit centers are less work than a row for each sample. The
    # compiler fuses that work. The sum of unit centers must be the same in all processes.
    few_classes = not torch.compiler.is_compiling() and len(centers) <= len(batch.features)
    simplex = options.form == "simplex"
    weighted = batch.class_weight is not None and batch.label_smoothing > 0
    by_class = batch.target.is_floating_point() or group is not None or few_classes or weighted
    if by_class:
        unit_centers, norms = normalize(batch.centers)
        center_sum = unit_centers.sum(0)
        target_centers = expected_centers(batch, unit_centers, center_sum)
        gram = gram_matrix(unit_centers) if simplex else None
    else:
        target_centers, center_sum, norms = gather_centers(batch.centers, batch.target)
        target_centers = smooth_centers(batch, target_centers, center_sum, len(norms))
        gram = gram_of_centers(batch.centers) if simplex else None
    similarity = intra_class(batch, target_centers)
    num_centers = count_centers(norms)
    inter = inter_class(center_sum, gram, num_centers, len(norms))

    intra = reduce(similarity.loss, batch.sample_weight, None, "mean")
    if options.reduction == "mean":
        loss = intra + inter
    else:
        loss = reduce(similarity.loss, batch.sample_weight, inter, options.reduction)
    if options.reduction == "none":
        loss = loss.reshape(features.shape[:-1])
    statistics = CenterStatistics(norms, center_sum, gram, num_centers, len(norms))
    return TorchStep(
        loss, intra, inter, num_centers, batch, similarity, statistics, by_class, group
    )


class IntraClass(NamedTuple):
    """The samples beside the centers of their classes."""

    loss: Tensor  # (N,), the summands of Eq. 2 times the sample weights
    unit_features: Tensor  # (N, d)
    cosines: Tensor  # (N,), times the sample weights


def intra_class(batch: Batch, target_centers: Tensor) -> IntraClass:
    """Eq. 2, sample by sample; `target_centers` (N, d) are unit, or `expected_centers`."""
    unit_features, _ = normalize(batch.features)
    cosines = (unit_features * target_centers).sum(-1)
    weight: Tensor | float = 1.0 if batch.sample_weight is None else batch.sample_weight
    if not _is_expected(batch):
        cosines = cosines * weight
    cosines = clamp_value(cosines, -weight, weight)
    return IntraClass((weight - cosines) / 2, unit_features, cosines)


def _is_expected(batch: Batch) -> bool:
    """Whether centers are expected centers, which hold the class weights."""
    return batch.target.is_floating_point() or batch.label_smoothing > 0


def expected_centers(batch: Batch, unit_centers: Tensor, center_sum: Tensor) -> Tensor:
    """The unit center of each sample's class (N, d).

    Under class probabilities or label smoothing, the sum of all unit centers times the probability
    and the weight of their class.
    """
    if _is_expected(batch) and batch.class_weight is not None:
        unit_centers = unit_centers * batch.class_weight.unsqueeze(-1)
        center_sum = unit_centers.sum(0)
    if batch.target.is_floating_point():
        target_centers = matmul(batch.target, unit_centers)
    else:
        target_centers = unit_centers.index_select(0, batch.target)
    return smooth_centers(batch, target_centers, center_sum, len(unit_centers))


def smooth_centers(
    batch: Batch, target_centers: Tensor, center_sum: Tensor, num_classes: int
) -> Tensor:
    """(1 - e) c^_y + (e / C) s, for the label smoothing e and the sum s of unit centers."""
    smoothing = batch.label_smoothing
    if smoothing == 0:
        return target_centers
    return (1 - smoothing) * target_centers + smoothing / num_classes * center_sum


def reduce(
    intra: Tensor, sample_weight: Tensor | None, inter: Tensor | None, reduction: Reduction
) -> Tensor:
    """The loss, from the summands of Eq. 2 and, if given, the separation of the centers."""
    if reduction == "mean":
        if sample_weight is None:
            mean = intra.mean() if len(intra) else intra.sum()
        else:
            total = sample_weight.sum()
            mean = intra.sum() / total.masked_fill(total == 0, 1)
        return mean if inter is None else mean + inter
    if inter is not None:
        intra = intra + (inter if sample_weight is None else sample_weight * inter)
    return intra if reduction == "none" else intra.sum()


class TorchStep(NamedTuple):
    """A step by PyTorch's operators."""

    loss: Tensor
    intra: Tensor
    inter: Tensor
    num_centers: Tensor
    batch: Batch
    similarity: IntraClass
    statistics: CenterStatistics
    by_class: bool  # whether the update works on sums over classes, or on samples
    group: "ProcessGroup | None"

    def update_(
        self, centers: Tensor, center_lr: float | None, *, start_zeros: bool = False
    ) -> None:
        """Applies Eq. 8 to the centers of the step, or to a copy of them, in place."""
        with torch.no_grad():
            sums, counts = finite_samples(self.similarity, self.batch.valid)
            index: Tensor | None = self.batch.target
            if self.batch.target.is_floating_point():
                norms = self.statistics.norms
                sums, counts = probability_sums(sums, self.batch.target, counts, norms)
                index = None
            elif self.by_class:
                num_classes = self.statistics.num_classes
                sums, counts = class_sums(sums, self.batch.target, counts, num_classes)
                index = None
            if self.group is not None:
                dtype = torch.promote_types(centers.dtype, torch.float32)
                sums, counts = all_reduce_sums(self.group, dtype, sums, counts)
            # `batch.centers` is a copy if the step computed in another type than the centers'.
            in_place = centers.dtype == self.batch.centers.dtype
            updated = centers if in_place else self.batch.centers
            update_centers_(
                updated,
                self.statistics,
                sums,
                counts,
                index,
                center_lr=center_lr,
                start_zeros=start_zeros,
            )
            if not in_place:
                centers.copy_(updated)


def finite_samples(similarity: IntraClass, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Unit features and a mask (N,), both 0 for samples that are ignored or not finite."""
    finite = similarity.cosines.isfinite()
    valid = torch.ones_like(similarity.cosines) if valid is None else valid
    if has_values(finite) and bool(finite.all()):
        return similarity.unit_features, valid
    units = similarity.unit_features.where(finite.unsqueeze(-1), 0)
    return units, valid.where(finite, 0)


def class_sums(
    units: Tensor, target: Tensor, valid: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """For each class the sum of its unit features (C, d) and the number of its samples (C,)."""
    sums = units.new_zeros(num_classes, units.shape[1]).index_add(0, target, units)
    return sums, units.new_zeros(num_classes).index_add(0, target, valid)


def probability_sums(
    units: Tensor, target: Tensor, valid: Tensor, norms: Tensor
) -> tuple[Tensor, Tensor]:
    """`class_sums` by class probabilities.

    A class whose center is zero sums over the samples that have no more probable class. A class
    with a probability that is not finite has neither sum nor number.
    """
    counts = matmul(valid, target)
    if not (has_values(norms) and bool(norms.isfinite().all())):
        less_probable = target < target.amax(-1, keepdim=True)
        target = target.masked_fill(less_probable & norms.isinf(), 0)
    return matmul(target.mT, units).nan_to_num(0, 0, 0), counts.nan_to_num(0, 0, 0)
