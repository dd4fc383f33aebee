"""The arguments of a step, checked and prepared: one type, and samples in one dimension."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from separate_loss import _checks
from separate_loss._torch import assert_on_device, in_compiled_transform, under_vmap
from separate_loss._tracing import has_values

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Options(NamedTuple):
    """The keyword arguments of `separate_loss.functional.separate_loss`."""

    form: _checks.Form = "simplex"
    weight: Tensor | None = None
    ignore_index: int = -100
    reduction: _checks.Reduction = "mean"
    label_smoothing: float = 0.0

    def check(self) -> None:
        """Validates all but the class weights."""
        _checks.check_choice("form", self.form, _checks.FORMS)
        _checks.check_int("ignore_index", self.ignore_index)
        _checks.check_choice("reduction", self.reduction, _checks.REDUCTIONS)
        _checks.check_label_smoothing(self.label_smoothing)


class Batch(NamedTuple):
    """Samples and centers; `valid` and `sample_weight` are None where they are 1 for all."""

    features: Tensor  # (N, d); 0 for ignored samples
    target: Tensor  # (N,) class indices, or (N, C) class probabilities
    valid: Tensor | None  # (N,): 0 for ignored samples, 1 for others
    sample_weight: Tensor | None  # (N,): 0 for ignored samples
    centers: Tensor  # (C, d)
    weight: Tensor | None  # class weights in the type of the centers
    options: Options
    group: "ProcessGroup | None" = None  # the processes whose samples update the centers


def check_arguments(
    features: Tensor, target: Tensor, centers: Tensor, options: Options,
    num_classes: int | None = None,
) -> None:  # fmt: skip
    """Validates the arguments; pass `num_classes` if `centers` is one shard."""
    options.check()
    if num_classes is None:
        _checks.check_centers("centers", centers)
        num_classes = len(centers)
    _checks.check_batch(features, target, num_classes)
    _checks.check_matches_centers(features, centers, options.weight)


def prepare_batch(
    features: Tensor, target: Tensor, centers: Tensor, options: Options,
    num_classes: int | None = None, group: "ProcessGroup | None" = None,
) -> Batch:  # fmt: skip
    """Converts validated arguments; pass `num_classes` if `centers` is one shard."""
    num_classes = len(centers) if num_classes is None else num_classes
    dtype = compute_dtype(features, centers)
    features = features.to(dtype).reshape(-1, centers.shape[1])
    weight = None if options.weight is None else options.weight.to(dtype)
    valid = sample_weight = None
    if target.is_floating_point():
        target = target.to(dtype).reshape(-1, num_classes)
        sample_weight = target.sum(-1) if weight is None else target @ weight
    else:
        target, mask = mask_ignored(target.reshape(-1), num_classes, options.ignore_index)
        if mask is not None:
            valid = sample_weight = mask.to(dtype)
            features = features.where(mask.unsqueeze(-1), 0)
        if weight is not None:
            sample_weight = weight.index_select(0, target)
            sample_weight = sample_weight if valid is None else sample_weight * valid
    smoothing = options.label_smoothing
    if smoothing > 0 and sample_weight is not None and sample_weight is not valid:
        total = num_classes if weight is None else weight.sum()
        uniform = smoothing / num_classes * (total if valid is None else total * valid)
        sample_weight = (1 - smoothing) * sample_weight + uniform
    return Batch(features, target, valid, sample_weight, centers.to(dtype), weight, options, group)


def mask_ignored(
    target: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor | None]:
    """Class indices as int64 with 0 in place of `ignore_index`, and a mask of the other samples.

    The mask is None if no sample is ignored and the values show it. A label outside [0, C) raises
    IndexError where its value can be read at once. Elsewhere an assertion on the device fails.
    """
    target, readable = target.long(), has_values(target)
    if readable:
        if target.numel() == 0:
            return target, None
        lowest, highest = (bound.item() for bound in target.aminmax())
        if lowest >= 0 and highest < num_classes and not lowest <= ignore_index <= highest:
            return target, None
    mask = target != ignore_index
    target = target.where(mask, 0)
    inside = (target >= 0) & (target < num_classes)
    message = f"target must hold class indices in [0, {num_classes}) or ignore_index"
    if readable:
        wrong = target[~inside]
        if wrong.numel():
            raise IndexError(f"{message} ({ignore_index}), got {int(wrong[0])}")
    elif not (in_compiled_transform() if torch.compiler.is_compiling() else under_vmap(target)):
        assert_on_device(inside.all(), message)  # which has no batched form
    return target, mask


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The widest type of the tensors, float32 or wider."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.dtype != dtype:  # `promote_types` is an operator
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
