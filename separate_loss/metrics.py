"""Compactness of classes, their separation, and how true learned centers are, as in Table 1.

All figures are cosines in [-1, 1], not the similarities of Eq. 1, without a graph, and are computed
in float64 if the device supports it. A class without samples has no center: its row and its figures
are NaN, and means exclude it. Features are worked on in parts, so that no metric copies them.
"""

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, Self, get_args, overload

import torch
import torch.distributed as dist
from torch import Tensor

from separate_loss import _checks
from separate_loss._batch import mask_ignored
from separate_loss._distributed import check_same_settings, resolve_group
from separate_loss._ops import BLOCK_SIZE
from separate_loss._terms import normalize

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "ClassStatistics",
    "center_agreement",
    "class_centers",
    "inter_class_similarity",
    "intra_class_similarity",
    "nearest_center",
]

Reduction = Literal["none", "mean"]
REDUCTIONS = get_args(Reduction)


class ClassStatistics:
    """Accumulates batches for the metrics, in O(C d) memory; `all_reduce` adds up processes.

    Args:
        num_classes: C, at least 2.
        feature_dim: d, at least 1.
        ignore_index: samples with this class index are ignored.
        device: of the batches.

    Examples:
        >>> statistics = ClassStatistics(num_classes=2, feature_dim=2)
        >>> _ = statistics.update(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 1]))
        >>> _ = statistics.update(torch.tensor([[1.0, 2.0]]), torch.tensor([0]))
        >>> statistics.class_centers()
        tensor([[1., 1.],
                [0., 3.]], dtype=torch.float64)
        >>> statistics.intra_class_similarity(reduction="none")
        tensor([0.8279, 1.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        *,
        ignore_index: int = -100,
        device: torch.device | str | int | None = None,
    ) -> None:
        _checks.check_int("num_classes", num_classes, least=2)
        _checks.check_int("feature_dim", feature_dim, least=1)
        _checks.check_int("ignore_index", ignore_index)
        self.ignore_index = ignore_index
        self.sums = _wide(torch.zeros(num_classes, feature_dim, device=device))
        self.unit_sums = torch.zeros_like(self.sums)
        self.counts = torch.zeros_like(self.sums[:, 0])

    def update(self, features: Tensor, target: Tensor) -> Self:
        """Adds a batch of features `(*, d)` with class indices `(*)`, and returns itself."""
        num_classes, feature_dim = self.sums.shape
        _checks.check_batch(features, target, num_classes)
        if target.is_floating_point():
            raise TypeError(f"target must hold class indices, got {target.dtype}")
        _checks.check_device("features", features, "ClassStatistics", self.sums)
        _checks.check_matches_centers(features, self.sums)
        index, mask = mask_ignored(target.reshape(-1), num_classes, self.ignore_index)
        valid = torch.ones_like(index) if mask is None else mask
        self.counts.index_add_(0, index, valid.to(self.counts))
        for rows, part in _parts(features, feature_dim):
            vectors = part if mask is None else part.where(mask[rows].unsqueeze(-1), 0)
            self.sums.index_add_(0, index[rows], vectors)
            self.unit_sums.index_add_(0, index[rows], normalize(vectors)[0])
        return self

    def all_reduce(self, process_group: "ProcessGroup | None" = None) -> "ClassStatistics":
        """Returns new statistics of the samples of all processes, and keeps its own.

        Every process of the group must make the call; None takes all processes. Where
        torch.distributed is not initialised, the result is a copy.
        """
        total = copy.deepcopy(self)
        group = resolve_group(process_group, sync_centers=True)
        if group is not None:
            sizes: dict[str, object] = {"num_classes and feature_dim": tuple(self.sums.shape)}
            check_same_settings(sizes, self.sums.device, group)
            for part in (total.sums, total.unit_sums, total.counts):
                dist.all_reduce(part, group=group)
        return total

    def class_centers(self) -> Tensor:
        """Returns what the function `class_centers` returns."""
        return self.sums / self.counts.unsqueeze(-1)

    def intra_class_similarity(
        self, centers: Tensor | None = None, *, reduction: Reduction = "mean"
    ) -> Tensor:
        """Returns what the function `intra_class_similarity` returns; None uses the class means."""
        centers = self.class_centers() if centers is None else centers
        _checks.check_shape("centers", centers, tuple(self.sums.shape))
        # The mean cosine of a class is the mean of its unit vectors along its center.
        means = self.unit_sums / self.counts.unsqueeze(-1)
        return _reduce((means * normalize(_wide(centers))[0]).sum(-1), reduction)


def class_centers(
    features: Tensor, target: Tensor, num_classes: int, *, ignore_index: int = -100
) -> Tensor:
    """The true class centers: the mean feature of each class.

    Args:
        features: floating point, `(*, d)`; maps as in `separate_loss.functional.separate_loss`.
        target: class indices, `(*)`, in [0, C) or `ignore_index`.
        num_classes: C, at least 2.
        ignore_index: samples with this class index are ignored.

    Returns:
        Means (C, d); NaN for a class without samples.

    Raises:
        TypeError, ValueError, IndexError: an argument is of a wrong type, size or range.

    Examples:
        >>> class_centers(torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.tensor([1, 1]), 2)
        tensor([[nan, nan],
                [1., 1.]], dtype=torch.float64)
    """
    return _statistics(features, target, num_classes, ignore_index).class_centers()


def intra_class_similarity(
    features: Tensor,
    target: Tensor,
    centers: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean cosine of a class's features to its center.

    Args:
        features, target, ignore_index: as in `class_centers`.
        centers: learned centers or those of `class_centers`, (C, d).
        reduction: ``"mean"`` over the classes, or ``"none"`` for one figure per class.

    Returns:
        A scalar, or (C,).

    Raises:
        TypeError, ValueError, IndexError: an argument is of a wrong type, size or range.

    Examples:
        >>> features, target = torch.tensor([[1.0, 0], [0, 2], [1, 1]]), torch.tensor([0, 0, 1])
        >>> intra_class_similarity(features, target, torch.eye(2), reduction="none")
        tensor([0.5000, 0.7071], dtype=torch.float64)
    """
    _checks.check_centers("centers", centers)
    statistics = _statistics(features, target, centers.shape[0], ignore_index)
    return statistics.intra_class_similarity(centers, reduction=reduction)


def inter_class_similarity(centers: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Mean cosine between centers of different classes; per class, to those of all others.

    Args:
        centers: learned centers or those of `class_centers`, (C, d); NaN rows are excluded.
        reduction: ``"mean"`` over the classes, or ``"none"`` for one figure per class.

    Returns:
        A scalar, or (C,); NaN where fewer than two classes have a center.

    Raises:
        TypeError, ValueError: an argument is of a wrong type, size or value.

    Examples:
        >>> inter_class_similarity(torch.tensor([[2.0, 0.0], [0.0, 1.0], [-3.0, 0.0]]))
        tensor(-0.3333, dtype=torch.float64)
    """
    _checks.check_centers("centers", centers)
    units, _ = normalize(_wide(centers))
    others = units.isfinite().all(-1).sum() - 1
    cosines = (units * (units.nansum(0) - units)).sum(-1) / others.clamp(min=0)
    return _reduce(cosines, reduction)


def center_agreement(
    centers: Tensor, true_centers: Tensor, *, reduction: Reduction = "mean"
) -> Tensor:
    """Cosine of each learned center to the true center of its class.

    Args:
        centers: learned centers, (C, d).
        true_centers: those of `class_centers`, (C, d); NaN rows are excluded.
        reduction: ``"mean"`` over the classes, or ``"none"`` for one figure per class.

    Returns:
        A scalar, or (C,).

    Raises:
        TypeError, ValueError: an argument is of a wrong type, size or value.

    Examples:
        >>> center_agreement(torch.eye(2), torch.tensor([[2.0, 0.0], [1.0, 1.0]]), reduction="none")
        tensor([1.0000, 0.7071], dtype=torch.float64)
    """
    _checks.check_centers("centers", centers)
    _checks.check_shape("true_centers", true_centers, tuple(centers.shape))
    (units, _), (true_units, _) = normalize(_wide(centers)), normalize(_wide(true_centers))
    return _reduce((units * true_units).sum(-1), reduction)


@overload
def nearest_center(
    features: Tensor, centers: Tensor, *, return_cosines: Literal[False] = False
) -> Tensor: ...


@overload
def nearest_center(
    features: Tensor, centers: Tensor, *, return_cosines: Literal[True]
) -> tuple[Tensor, Tensor]: ...


def nearest_center(
    features: Tensor, centers: Tensor, *, return_cosines: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The class whose center has the largest cosine with a sample: a prediction without a head.

    If it is right more often than the head, the directions of the features separate the classes and
    the head does not use them.

    Args:
        features: floating point, `(*, d)`. Maps `(N, d, *)` need `movedim(1, -1)`; without it those
            of width d are refused, as they fit both orders.
        centers: learned or true centers, (C, d). Zero and NaN centers are nearest to no sample.
        return_cosines: whether to return the largest cosines as well.

    Returns:
        Class indices `(*)`, int64, and with `return_cosines` their cosines `(*)`. The first class
        of equal cosines; -1 and NaN for samples that are not finite, or if no center can be used.

    Raises:
        TypeError, ValueError: types, shapes or devices do not fit.

    Examples:
        >>> centers = torch.tensor([[2.0, 0.0], [0.0, 0.1]])
        >>> nearest_center(torch.tensor([[1.0, 0.5], [1.0, 5.0]]), centers)
        tensor([0, 1])
    """
    _checks.check_vectors("features", features)
    _checks.check_centers("centers", centers)
    _checks.check_matches_centers(features, centers)
    _checks.check_bool("return_cosines", return_cosines)
    _checks.check_order(features)
    units, norms = normalize(_wide(centers))
    missing = ~norms.isfinite()
    index = torch.empty(features.shape[:-1].numel(), dtype=torch.long, device=features.device)
    cosines = torch.empty_like(index, dtype=units.dtype)
    for rows, vectors in _parts(features, len(centers)):
        found = (normalize(vectors)[0] @ units.mT).masked_fill_(missing, -torch.inf)
        cosines[rows], index[rows] = found.max(-1)
    unknown = ~cosines.isfinite()
    index = index.masked_fill_(unknown, -1).view(features.shape[:-1])
    cosines = cosines.clamp_(-1, 1).masked_fill_(unknown, torch.nan).view_as(index)
    return (index, cosines) if return_cosines else index


def _statistics(
    features: Tensor, target: Tensor, num_classes: int, ignore_index: int
) -> ClassStatistics:
    _checks.check_vectors("features", features)
    return ClassStatistics(
        num_classes, features.shape[-1], ignore_index=ignore_index, device=features.device
    ).update(features, target)


def _parts(features: Tensor, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Features in parts: the samples of each, and their vectors in the type of the metrics.

    A part has room for `width` values a sample beside the vectors.
    """
    features = torch.atleast_2d(features)
    first, size = 0, max(1, BLOCK_SIZE // max(width, features.shape[-1]))
    # Along the first dimension, since flattening copies a map that movedim(1, -1) has made.
    for block in features.split(max(1, size // max(1, features.shape[1:-1].numel()))):
        for vectors in block.reshape(-1, features.shape[-1]).split(size):
            yield slice(first, first + len(vectors)), _wide(vectors)
            first += len(vectors)


def _reduce(cosines: Tensor, reduction: Reduction) -> Tensor:
    _checks.check_choice("reduction", reduction, REDUCTIONS)
    cosines = cosines.clamp(-1, 1)
    return cosines.nanmean() if reduction == "mean" else cosines


def _wide(tensor: Tensor) -> Tensor:
    """Detaches and converts to float64, or to float32 on Apple GPUs, which have no float64."""
    return tensor.detach().float() if tensor.device.type == "mps" else tensor.detach().double()
