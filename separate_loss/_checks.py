"""Validation: every error names the argument, what was expected and what came."""

import itertools
import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from separate_loss._torch import under_vmap
from separate_loss._tracing import has_values

Reduction = Literal["none", "mean", "sum"]
CenterUpdate = Literal["paper", "gradient", "none"]
CenterInit = Literal["features", "sphere", "normal", "uniform"]
ClassDim = Literal[1, -1]
Separation = Literal["mean", "square"]
# At import, as the compiler of torch 2.6 traces no `get_args`.
REDUCTIONS, CENTER_UPDATES = get_args(Reduction), get_args(CenterUpdate)
CENTER_INITS, CLASS_DIMS = get_args(CenterInit), get_args(ClassDim)
SEPARATIONS = get_args(Separation)


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        expected = ", ".join(map(repr, allowed))
        raise ValueError(f"{name} must be one of {expected}, got {value!r}")


def check_int(name: str, value: object, least: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def check_nonnegative(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (float, int)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")


def check_center_lr(value: object) -> None:
    if value is not None:
        check_nonnegative("center_lr", value)


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
    """The name of an initialisation that the update supports, or finite values (C, d)."""
    if not isinstance(value, Tensor):
        check_choice("center_init", value, CENTER_INITS)
        if value == "features" and center_update != "paper":
            raise ValueError(
                "center_init='features' needs center_update='paper', which starts the centers, "
                f"got center_update={center_update!r}"
            )
        return
    check_centers("center_init", value)
    if value.shape != shape:
        raise ValueError(f"center_init must have shape {shape}, got {tuple(value.shape)}")
    if not bool(value.isfinite().all()):
        raise ValueError("center_init must hold finite values, got NaN or infinity")
    if center_update == "gradient" and not bool(value.any(-1).all()):
        raise ValueError(
            "center_init must hold no row of zeros for center_update='gradient', as a zero center "
            f"has no gradient, got one for class {int(value.any(-1).int().argmin())}"
        )


def check_initialized(name: str, value: Tensor, is_set: bool) -> None:
    """Finite values that were set. Synchronises, so it is for the first call."""
    how = "call reset_parameters(), or load a checkpoint that contains them"
    if value.is_meta or type(value) not in (Tensor, Parameter) or under_vmap(value):
        return
    # Loaders of transformers set values without load_state_dict, and leave this mark.
    if not is_set and not getattr(value, "_is_hf_initialized", False):
        raise RuntimeError(f"{name} were made on the meta device and never got values; {how}")
    if value.numel() and not math.isfinite(torch.linalg.vector_norm(value.detach(), math.inf)):
        raise ValueError(f"{name} must hold finite values, got NaN or infinity; {how}")


def check_batch(
    features: Tensor, target: Tensor, num_classes: int, *, name: str = "features"
) -> None:
    """Features (*, d) with a target of class indices (*) or class probabilities (*, C)."""
    check_vectors(name, features)
    check_tensor("target", target)
    if target.dtype == torch.bool or target.is_complex():
        raise TypeError(
            "target must hold class indices (an integer type) or class probabilities "
            f"(a floating type), got {target.dtype}"
        )
    expected: tuple[int, ...] = features.shape[:-1]
    if target.is_floating_point():
        expected = (*expected, num_classes)
    if target.shape != expected:
        kind = "probabilities" if target.is_floating_point() else "indices"
        column = target.shape == (*expected, 1)
        hint = "; a column of labels needs target.squeeze(-1)" if column else ""
        if target.is_floating_point() and target.shape == features.shape[:-1]:
            hint = "; class indices need target.long()"
        raise ValueError(
            f"target of class {kind} must have shape {tuple(expected)} beside {name} of shape "
            f"{tuple(features.shape)} and {num_classes} classes, got {tuple(target.shape)}{hint}"
        )
    check_device("target", target, name, features)


def check_logits(logits: Tensor, target: Tensor, class_dim: int, num_classes: int) -> None:
    """Logits with the classes in dimension `class_dim`, and a target of the same samples."""
    if logits.shape[class_dim] != num_classes:
        place = "the last dimension" if class_dim == logits.ndim - 1 else f"dimension {class_dim}"
        raise ValueError(
            f"logits must have {num_classes} values in {place}, one per class, "
            f"got shape {tuple(logits.shape)}"
        )
    check_tensor("target", target)
    if logits.ndim <= 2:
        return
    samples = (*logits.shape[:class_dim], *logits.shape[class_dim + 1 :])
    if target.shape != (logits.shape if target.is_floating_point() else samples):
        raise ValueError(
            f"target must have shape {samples} for class indices, or {tuple(logits.shape)} for "
            f"class probabilities, beside logits of shape {tuple(logits.shape)} with the classes "
            f"in dimension {class_dim}, got {tuple(target.shape)} of {target.dtype}"
        )


def dim_of(class_dim: int, sizes: tuple[int, ...]) -> int:
    """The index of the dimension `class_dim`, 1 or -1, in a tensor of these sizes."""
    return len(sizes) - 1 if class_dim == -1 or len(sizes) == 1 else 1


def dims_of(sizes: tuple[int, ...]) -> list[int]:
    """The indices of the last dimension and of dimension 1."""
    return list(dict.fromkeys([len(sizes) - 1, dim_of(1, sizes)]))


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
    for dims in itertools.product(dims_of(shape), dims_of(output_shape)):
        samples, others = (
            [size for dim, size in enumerate(of) if dim != left_out and size != 1]
            for of, left_out in zip((shape, output_shape), dims, strict=True)
        )
        if samples == others and (shape[dims[0]], output_shape[dims[1]]) == sizes:
            fitting += [dims] * (1 if len(set(samples)) == len(samples) else 2)
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
        raise ValueError(
            f"features must have {feature_dim} values in the last dimension, as centers have, "
            f"got shape {tuple(features.shape)}"
        )
    check_device("features", features, "centers", centers)
    if weight is not None:
        check_weight(weight, num_classes)
        check_device("weight", weight, "centers", centers)


def check_weight(weight: Tensor, num_classes: int) -> None:
    """Floating point, (C,), and not negative if the values can be read at once."""
    check_vectors("weight", weight)
    if weight.shape != (num_classes,):
        raise ValueError(
            f"weight must have shape ({num_classes},), one value per class, "
            f"got {tuple(weight.shape)}"
        )
    if has_values(weight) and not bool((weight >= 0).all()):
        raise ValueError(f"weight must not be negative or NaN, got a least value of {weight.min()}")


def check_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on {other.device}, as {other_name} is, got {value.device}"
        )
