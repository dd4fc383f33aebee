"""Validation: every error names the argument, what was expected and what came."""

import itertools
import math
import warnings
from numbers import Integral, Real
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import Module

from separate_loss._torch import under_vmap
from separate_loss._tracing import has_values

Reduction = Literal["none", "mean", "sum"]
Form = Literal["simplex", "paper"]
CenterUpdate = Literal["forward", "gradient", "none"]
CenterInit = Literal["features", "sphere"]
ClassDim = Literal[1, -1]
# At import, as the compiler of torch 2.6 traces no `get_args`.
REDUCTIONS, FORMS, CLASS_DIMS = get_args(Reduction), get_args(Form), get_args(ClassDim)
CENTER_UPDATES, CENTER_INITS = get_args(CenterUpdate), get_args(CenterInit)


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        expected = ", ".join(map(repr, allowed))
        raise ValueError(f"{name} must be one of {expected}, got {value!r}")


def check_int(name: str, value: object, least: int | None = None) -> int:
    """Returns an integer of Python, of NumPy or the like as an int."""
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if least is not None and int(value) < least:
        # A head with one output, trained by a binary loss.
        binary = (name, value) == ("num_classes", 1)
        hint = "; for one logit use SeparateLoss(2, feature_dim) beside the binary loss" * binary
        raise ValueError(f"{name} must be at least {least}, got {value}{hint}")
    return int(value)


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_nonnegative(name: str, value: object) -> float:
    """Returns a number of Python, of NumPy or the like as a float."""
    if isinstance(value, bool) or not isinstance(value, (float, int, Real)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")
    return number


def check_center_lr(value: object) -> float | None:
    return None if value is None else check_nonnegative("center_lr", value)


def check_label_smoothing(value: object) -> None:
    if check_nonnegative("label_smoothing", value) > 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {value}")


def check_no_effect(name: str, value: object, default: object, center_update: str) -> None:
    if value is not default:
        raise ValueError(
            f"{name} must be {default} for center_update={center_update!r}, where it has no "
            f"effect, got {value!r}"
        )


def check_module(name: str, value: object) -> None:
    if not isinstance(value, Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(value).__name__}")


def check_tensor(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor; pass its full_tensor(), or its "
            "to_local() if each process has its own samples"
        )


def check_vectors(name: str, value: Tensor) -> None:
    """Floating point, (*, d)."""
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if value.ndim == 0:
        raise ValueError(f"{name} must have shape (*, d), got a scalar")


def check_centers(name: str, value: Tensor) -> None:
    """Floating point, (C, d) with C >= 2 and d >= 1."""
    check_vectors(name, value)
    if value.ndim != 2:
        raise ValueError(f"{name} must have shape (C, d), got {tuple(value.shape)}")
    if value.shape[0] < 2 or value.shape[1] < 1:
        raise ValueError(
            f"{name} must hold at least 2 classes and 1 feature, got shape {tuple(value.shape)}"
        )


def check_center_init(
    value: CenterInit | Tensor, shape: tuple[int, int], center_update: str
) -> None:
    """The name of an initialisation that the update supports, or values (C, d)."""
    if not isinstance(value, Tensor):
        check_choice("center_init", value, CENTER_INITS)
        if value == "features" and center_update != "forward":
            raise ValueError(
                "center_init='features' needs center_update='forward', which starts the centers, "
                f"got center_update={center_update!r}"
            )
        return
    check_shape("center_init", value, shape)
    if center_update == "gradient" and not value.is_meta:
        check_directions("center_init", value)


def check_shape(name: str, value: Tensor, shape: tuple[int, ...], meaning: str = "") -> None:
    """Floating point, of a given shape."""
    check_vectors(name, value)
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}{meaning}, got {tuple(value.shape)}")


def check_directions(name: str, value: Tensor) -> None:
    """No row that counts as zero. Synchronises, so it is for the first call."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    norms = torch.linalg.vector_norm(value.detach(), dim=-1, dtype=dtype)
    usable = norms.isfinite() & (norms > torch.finfo(dtype).tiny ** 0.5)
    if not bool(usable.all()):
        raise ValueError(
            f"{name} must hold no row of zeros or NaN for center_update='gradient', as such a "
            f"center has no gradient, got one for class {int(usable.int().argmin())}"
        )


def check_batch(
    features: Tensor, target: Tensor, num_classes: int, *, name: str = "features"
) -> None:
    """Features (*, d) with a target of class indices (*) or class probabilities (*, C)."""
    check_vectors(name, features)
    check_tensor("target", target)
    if target.dtype == torch.bool or target.is_complex():
        raise TypeError(
            "target must hold class indices (an integer type) or class probabilities "
            f"(a floating type), got {target.dtype}; class indices need target.long()"
        )
    samples = tuple(features.shape[:-1])
    expected = (*samples, num_classes) if target.is_floating_point() else samples
    if target.shape != expected:
        kind = "probabilities" if target.is_floating_point() else "indices"
        raise ValueError(
            f"target of class {kind} must have shape {expected} beside {name} of shape "
            f"{tuple(features.shape)} and {num_classes} classes, got {tuple(target.shape)}"
            f"{_target_hint(target, samples) or _order_hint(features, target, num_classes)}"
        )
    if name == "features":
        check_order(features, samples)
    check_device("target", target, name, features)


def _target_hint(target: Tensor, samples: tuple[int, ...]) -> str:
    """How class indices of a wrong type or shape become right."""
    column = target.shape == (*samples, 1)
    if not column and target.shape != samples:
        return ""
    if not target.is_floating_point():
        return "; a column of labels needs target.squeeze(-1)"
    return "; class indices need target.long()" + ", a column also squeeze(-1)" * column


def _order_hint(features: Tensor, target: Tensor, num_classes: int) -> str:
    """How features (N, d, *) become (*, d)."""
    if features.ndim < 3:
        return ""
    batch, places, labels = features.shape[0], features.shape[2:], target.shape
    if labels in ((batch, *places), (batch, *places, num_classes)):
        return "; features (N, d, *) need features.movedim(1, -1)"
    if labels == (batch, num_classes, *places):
        return "; features (N, d, *) need features.movedim(1, -1), and target.movedim(1, -1)"
    if labels in ((batch,), (batch, num_classes)):
        pooled = "" if math.prod(places) == 1 else " after pooling"
        return f"; a label for each map needs features.flatten(1){pooled}"
    return ""


def check_order(features: Tensor, samples: tuple[int, ...] | None = None) -> None:
    """Refuses maps whose shape fits (N, *, d) as well as (N, d, *), given the target's shape.

    Where a view has its last dimension outermost in memory, movedim(1, -1) has made it.
    """
    sizes, strides = features.shape[1:], features.stride()[1:]
    if len(sizes) < 3 or sizes[0] < 2 or sizes[0] != sizes[-1]:
        return
    if (samples is None or samples[1:] == sizes[1:]) and strides[-1] <= max(strides[:-1]):
        raise ValueError(
            f"features of shape {tuple(features.shape)} may be (N, *, d) or (N, d, *); pass "
            "features.movedim(1, -1).flatten(0, -2) if dimension 1 holds d, and else "
            "features.flatten(0, -2), beside target.flatten() of class indices"
        )


def warn_probabilities(target: Tensor) -> bool:
    """Warns of rows that are no class probabilities, and returns whether it has read any.

    Synchronises, so it is for the first call.
    """
    if not target.is_floating_point() or target.is_meta or not target.numel():
        return False
    if torch.compiler.is_compiling() or under_vmap(target) or type(target) is not Tensor:
        return False
    target = target.detach()
    sums = target.sum(-1, dtype=torch.promote_types(target.dtype, torch.float32))
    # At least that of values that were rounded to float16 before.
    rounding = max(4 * torch.finfo(target.dtype).eps, 1e-3)
    right = (((sums - 1).abs() <= rounding) | (sums.abs() <= rounding)) & (target.amin(-1) >= 0)
    if not bool(right.all()):
        row = target.reshape(-1, target.shape[-1])[int(right.flatten().int().argmin())]
        warnings.warn(
            "target holds rows that are no class probabilities, which are not negative and sum to "
            f"1, or to 0 for an ignored sample: got a row with the least value {row.min():.4g} and "
            f"the sum {row.sum():.4g}. Divide several labels of a sample by their number; logits "
            "need softmax(-1)",
            stacklevel=5,  # the call of the loss, from `SeparateLoss.forward`
        )
    return True


def check_logits(logits: Tensor, target: Tensor, class_dim: int, num_classes: int) -> None:
    """Logits with the classes in dimension `class_dim`, and a target of the same samples."""
    if logits.shape[class_dim] != num_classes:
        place = "the last dimension" if class_dim == logits.ndim - 1 else f"dimension {class_dim}"
        raise ValueError(
            f"logits must have {num_classes} values in {place}, one per class, "
            f"got shape {tuple(logits.shape)}"
        )
    check_tensor("target", target)
    samples = (*logits.shape[:class_dim], *logits.shape[class_dim + 1 :])
    soft = target.is_floating_point()
    if logits.ndim > 2:  # For others `check_batch` says more.
        if target.shape != (logits.shape if soft else samples):
            raise ValueError(
                f"target must have shape {samples} for class indices, or {tuple(logits.shape)} for "
                f"class probabilities, beside logits of shape {tuple(logits.shape)} with the "
                f"classes in dimension {class_dim}, got {tuple(target.shape)} of {target.dtype}"
                f"{_target_hint(target, samples)}"
            )
        logits = logits.movedim(class_dim, -1)
        target = target.movedim(class_dim, -1) if soft else target
    check_batch(logits, target, num_classes, name="logits")


def dim_of(class_dim: int, sizes: tuple[int, ...]) -> int:
    """The index of the dimension `class_dim`, 1 or -1, in a tensor of these sizes."""
    return len(sizes) - 1 if class_dim == -1 or len(sizes) == 1 else 1


def dims_of(sizes: tuple[int, ...]) -> list[int]:
    """The indices of the last dimension and of dimension 1."""
    return list(dict.fromkeys([len(sizes) - 1, dim_of(1, sizes)]))


def _sizes_but(dim: int, sizes: tuple[int, ...]) -> list[int]:
    """Sizes without that of one dimension and those of 1."""
    return [size for at, size in enumerate(sizes) if at != dim and size != 1]


def check_head_input(
    shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    sizes: tuple[int, int],
    class_dim: int,
    *,
    known: bool,
) -> None:
    """The input of a head whose output has the same samples in the same order.

    `sizes` are those of features and classes; `known` tells that the head has the layout of
    `class_dim`. If not, no other layout may fit.
    """
    if (*shape, *output_shape) == (shape[0], sizes[0], shape[0], sizes[1]):
        return  # (N, d) and (N, C)
    fitting = []
    for dim, output_dim in itertools.product(dims_of(shape), dims_of(output_shape)):
        samples = _sizes_but(dim, shape)
        fits = samples == _sizes_but(output_dim, output_shape)
        if fits and (shape[dim], output_shape[output_dim]) == sizes:
            # Equal sizes may have changed places.
            fitting += [(dim, output_dim)] * (1 if len(set(samples)) == len(samples) else 2)
    shapes = f"its input had shape {tuple(shape)} and its output {tuple(output_shape)}"
    if (dim_of(class_dim, shape), dim_of(class_dim, output_shape)) not in fitting:
        raise ValueError(
            f"the head must compute logits of the same samples from features of size {sizes[0]} "
            f"in dimension {class_dim}, but {shapes}; watch the module between features and "
            "logits, or pass feature_dim or class_dim"
        )
    if len(fitting) > 1 and not known:
        raise ValueError(
            f"the head may have moved dimensions: {shapes}, which fit in several orders; watch the "
            "linear layer or convolution inside of the head"
        )


def check_matches_centers(features: Tensor, centers: Tensor, weight: Tensor | None = None) -> None:
    """Features (*, d) and class weights (C,) that match the centers (C, d)."""
    num_classes, feature_dim = centers.shape
    if features.shape[-1] != feature_dim:
        hint = ""
        if features.ndim > 2 and features.shape[1] == feature_dim:
            call = "flatten(1)" if math.prod(features.shape[2:]) == 1 else "movedim(1, -1)"
            hint = f"; features (N, d, *) need features.{call}"
        raise ValueError(
            f"features must have {feature_dim} values in the last dimension, as centers have, "
            f"got shape {tuple(features.shape)}{hint}"
        )
    moves = f"; a loss moves by criterion.to({str(features.device)!r})"
    check_device("features", features, "centers", centers, moves)
    if weight is not None:
        check_weight(weight, num_classes)
        check_device("weight", weight, "centers", centers)


def check_weight(weight: Tensor, num_classes: int) -> None:
    """Floating point, (C,), and not negative if the values can be read at once."""
    check_shape("weight", weight, (num_classes,), ", one value per class")
    if has_values(weight) and not bool((weight >= 0).all()):
        raise ValueError(f"weight must not be negative or NaN, got a least value of {weight.min()}")


def check_device(name: str, value: Tensor, other_name: str, other: Tensor, hint: str = "") -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on {other.device}, as {other_name} is, got {value.device}{hint}"
        )
