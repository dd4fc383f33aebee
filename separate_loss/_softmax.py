"""Softmax loss plus separate loss, for a model that returns only logits."""

import warnings
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from separate_loss._batch import mask_ignored
from separate_loss._checks import (
    CLASS_DIMS,
    CenterInit,
    CenterUpdate,
    ClassDim,
    Form,
    Reduction,
    check_batch,
    check_choice,
    check_head_input,
    check_int,
    check_logits,
    check_nonnegative,
    check_vectors,
)
from separate_loss._layout import dim_of
from separate_loss._modules import SeparateLoss
from separate_loss._recorder import ForwardPass, Recorder
from separate_loss._torch import version_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SoftmaxSeparateLoss", "SoftmaxSeparateTerms"]

CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


class SoftmaxSeparateTerms(NamedTuple):
    """The terms of Eq. 9, detached scalars; `intra` is a mean under every reduction.

    Examples:
        >>> head = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.zeros_(head.weight)
        >>> criterion = SoftmaxSeparateLoss(head, center_update="none", center_init=torch.eye(2))
        >>> with torch.no_grad():
        ...     loss = criterion(head(torch.eye(2)), torch.tensor([0, 1]))
        >>> criterion.last_terms[:3]
        (tensor(0.6931), tensor(0.), tensor(0.2500))

    """

    softmax: Tensor
    intra: Tensor
    inter: Tensor
    num_centers: Tensor


class SoftmaxSeparateLoss(nn.Module):
    r"""Softmax loss plus separate loss (Eq. 9), for a model that returns logits only.

    $$ L = L_s + \lambda L_{sep} \tag{9} $$

    The loss records the input of `head`, and finds the features from which the logits were
    computed. The model, its `state_dict`, its copies and its pickles do not change.

    Args:
        head: the module that computes logits from features, for example the model's last
            `torch.nn.Linear` (`(*, d)` to `(*, C)`) or convolution (`(N, d, *)` to `(N, C, *)`).
            Its first argument is recorded.
        separate_weight: lambda, finite and not negative: 1 with the default form, 0.9 with
            ``form="paper"``, as in the paper. See `SeparateLoss` on large ones.
        num_classes: C; None reads it from the last linear or convolutional layer in `head`.
        feature_dim: d; None reads it from the first such layer.
        class_dim: the dimension of C in the head's output and of d in its input: 1 or -1. None
            takes 1 for heads whose last such layer is a convolution, and -1 for others.
        label_smoothing: as in `torch.nn.functional.cross_entropy`, in both terms; in [0, 1].
        center_update, center_lr, center_init, dtype: as in `SeparateLoss`.
        weight, ignore_index, reduction: as in `SeparateLoss`, in both terms.
        form, process_group, sync_centers: as in `SeparateLoss`.
        device: of the centers; None takes the head's.

    Shape:
        logits `(N, C, *)` and target `(N, *)` or `(N, C, *)`, as in
        `torch.nn.functional.cross_entropy`, or class-last: logits `(*, C)` and target `(*)` or
        `(*, C)`. To a scalar, or the shape of class indices for ``reduction="none"``.

    Attributes:
        separate: the `SeparateLoss`, with its `centers`.
        last_terms: softmax loss (its mean for ``reduction="none"``), intra- and inter-class loss of
            the last call, for logging; None before the first.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of its range, or `head`
            does not define its sizes.
        RuntimeError: in a call, if the logits cannot be traced to one forward pass of the head with
            the samples in the same order.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 3))
        >>> criterion = SoftmaxSeparateLoss(model[-1])
        >>> loss = criterion(model(torch.randn(16, 8)), torch.arange(16) % 3)
        >>> loss.backward()

    Source:
        Li et al., ACML 2019, PMLR 101:897-911.
    """

    def __init__(
        self,
        head: nn.Module,
        *,
        separate_weight: float = 1.0,
        num_classes: int | None = None,
        feature_dim: int | None = None,
        class_dim: ClassDim | None = None,
        label_smoothing: float = 0.0,
        form: Form = "simplex",
        center_update: CenterUpdate = "forward",
        center_lr: float | None = None,
        center_init: CenterInit | Tensor | None = None,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        process_group: "ProcessGroup | None" = None,
        sync_centers: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(head, nn.Module):
            raise TypeError(f"head must be a torch.nn.Module, got {type(head).__name__}")
        check_nonnegative("separate_weight", separate_weight)
        if class_dim is None:
            class_dim = _class_dim_of(head)
        check_choice("class_dim", class_dim, CLASS_DIMS)
        if device is None:
            device = next((parameter.device for parameter in head.parameters()), None)
        self.separate_weight = separate_weight
        self.class_dim = class_dim
        self.last_terms: SoftmaxSeparateTerms | None = None
        self.separate = SeparateLoss(
            _size_of("num_classes", num_classes, head),
            _size_of("feature_dim", feature_dim, head),
            center_update=center_update,
            center_lr=center_lr,
            center_init=center_init,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            form=form,
            label_smoothing=label_smoothing,
            process_group=process_group,
            sync_centers=sync_centers,
            device=device,
            dtype=dtype,
        )
        self._warned: set[str] = set()
        self._recorder: Recorder | None = None
        self._end: weakref.finalize[Any, Any] | None = None
        self.watch(head)

    def watch(self, head: nn.Module) -> None:
        """Records `head` instead of the present head.

        A loss that was copied or unpickled without its head needs this call once.
        """
        if not isinstance(head, nn.Module):
            raise TypeError(f"head must be a torch.nn.Module, got {type(head).__name__}")
        self.unwatch()
        self._recorder = Recorder()
        self._recorder.attach(head)
        self._detach_with_self()

    def unwatch(self) -> None:
        """Stops recording the head; calls need `features` until `watch` is called."""
        if self._end is not None:
            self._end()
        self._recorder = self._end = None

    def forward(self, logits: Tensor, target: Tensor, *, features: Tensor | None = None) -> Tensor:
        """Returns the loss of logits of the watched head; then, in training, updates the centers.

        Args:
            logits: the output of one forward pass of the head, possibly reshaped, cast, scaled or
                shifted, with the samples in the same order. Several passes may run before the
                calls. Several calls may use one pass until its graph is freed; the first of them
                updates the centers.
            target: class indices or class probabilities.
            features: the features of each sample, `(N, d, *)` or `(*, d)` as the head takes them.
                None takes those that were recorded with the logits.

        Returns:
            The loss under `reduction`.
        """
        check_vectors("logits", logits)
        if features is None:
            features, class_dim, forward_pass = self._features_of(logits)
            moving, recorded = (
                forward_pass.training and not forward_pass.moved,
                forward_pass.recorded,
            )
        else:
            check_vectors("features", features)
            forward_pass, class_dim = None, self._class_dim_by_shape(logits, target)
            moving, recorded = self._head_trains(), True
        logits, target, features = self._class_last(logits, target, features, class_dim)
        separate = self.separate
        softmax = _softmax_loss(logits, target, separate)
        # Last, so that invalid input does not change the centers.
        with torch.set_grad_enabled(torch.is_grad_enabled() and recorded):
            self._warn(logits, features, forward_pass is not None and not forward_pass.training)
            # Flat, since maps of d x d pixels with d features fit two orders.
            flat = target.reshape(-1, *target.shape[logits.ndim - 1 :])
            features = features.reshape(-1, separate.feature_dim)
            loss = separate._step(features, flat, may_update=moving)
            if forward_pass is not None and torch.is_grad_enabled() and separate.training:
                forward_pass.moved = True
        if separate.last_terms is not None:
            self.last_terms = SoftmaxSeparateTerms(softmax.detach().mean(), *separate.last_terms)
        loss = softmax.reshape(loss.shape) + self.separate_weight * loss
        return loss.reshape(logits.shape[:-1]) if separate.reduction == "none" else loss

    def _features_of(self, logits: Tensor) -> tuple[Tensor, int, ForwardPass]:
        """Features, the class dimension of the logits, and the recorded pass."""
        recorder = self._recorder
        if recorder is None:
            raise RuntimeError("no head is watched; call watch(head) first")
        forward_pass = recorder.take_compiled(logits) if torch.compiler.is_compiling() else None
        if forward_pass is None:
            forward_pass, class_dim = recorder.find(logits, self.class_dim)
        else:
            class_dim = dim_of(self.class_dim, logits.shape)
        features: Tensor = forward_pass.features
        check_vectors("the head's input", features)
        if not forward_pass.recorded and torch.is_grad_enabled() and logits.requires_grad:
            raise RuntimeError(
                "the watched head ran without recording gradients, so its features would get no "
                "gradient; run the model with gradients on, and use_reentrant=False in "
                "torch.utils.checkpoint"
            )
        if forward_pass.version is not None and version_of(features) != forward_pass.version:
            raise RuntimeError(
                "the head's input was changed in place after the head had read it; use "
                "operators that are not in place, such as torch.nn.ReLU(inplace=False)"
            )
        check_head_input(features, forward_pass.sizes, self.class_dim, self.separate.feature_dim)
        return features, class_dim, forward_pass

    def _class_dim_by_shape(self, logits: Tensor, target: Tensor) -> int:
        """The class dimension that fits the target; that of the head if both fit."""
        for class_dim in (self.class_dim, -self.class_dim):
            dim = dim_of(class_dim, logits.shape)
            samples = (*logits.shape[:dim], *logits.shape[dim + 1 :])
            fits = target.shape == (logits.shape if target.is_floating_point() else samples)
            if fits and logits.shape[dim] == self.separate.num_classes:
                return dim
        return dim_of(self.class_dim, logits.shape)

    def _class_last(
        self, logits: Tensor, target: Tensor, features: Tensor, class_dim: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Validated arguments, with classes and features in the last dimension."""
        separate = self.separate
        check_logits(logits, target, class_dim, separate.num_classes)
        logits = logits.movedim(class_dim, -1)
        if target.is_floating_point():
            target = target.movedim(class_dim, -1)
        check_batch(logits, target, separate.num_classes, name="logits")
        samples = logits.shape[:-1]
        for feature_dim in (self.class_dim, -self.class_dim):
            last = features.movedim(dim_of(feature_dim, features.shape), -1)
            if (
                last.shape[-1] == separate.feature_dim
                and last.shape[:-1].numel() == samples.numel()
            ):
                return logits, target, last.reshape(*samples, separate.feature_dim)
        raise ValueError(
            f"features must hold {separate.feature_dim} values for each of the samples of logits "
            f"of shape {tuple(logits.shape)}, got shape {tuple(features.shape)}"
        )

    def _head_trains(self) -> bool:
        head = None if self._recorder is None else self._recorder.module
        module = None if head is None else head()
        return module is None or module.training

    def _warn(self, logits: Tensor, features: Tensor, head_in_evaluation: bool) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        separate = self.separate
        if head_in_evaluation and separate.training and separate.center_update == "forward":
            self._warn_once(
                "the head ran in evaluation mode with gradients on, so the centers do not move; "
                "to validate, use torch.no_grad() and criterion.eval(); to train a model in "
                "evaluation mode, call head.train(), which has no effect on a linear layer"
            )
        if logits.requires_grad and not features.requires_grad:
            self._warn_once(
                "the features require no gradient, so the separate loss only updates centers: "
                "ignore this if all layers before the head are frozen; if the head is the whole "
                "model, pass its last layer as head"
            )

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, stacklevel=6)

    def _detach_with_self(self) -> None:
        # Remove the hooks when the loss is deleted; the head may live on.
        if self._recorder is not None:
            self._end = weakref.finalize(self, self._recorder.detach)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_end": None}  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._detach_with_self()

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return (
            f"separate_weight={self.separate_weight}, "
            f"class_dim={self.class_dim}, watching={self._recorder is not None}"
        )


def _layers(head: nn.Module) -> list[nn.Module]:
    """Linear and convolutional layers, and other modules with the same size attributes."""
    return [module for module in head.modules() if _size(module, "out") is not None]


def _size(layer: nn.Module, side: str) -> int | None:
    for name in (f"{side}_features", f"{side}_channels"):
        size = getattr(layer, name, None)
        if isinstance(size, int) and size > 0:
            return size
    return None


def _class_dim_of(head: nn.Module) -> ClassDim:
    layers = _layers(head)
    return 1 if layers and isinstance(layers[-1], CONVOLUTIONS) else -1


def _size_of(name: str, given: int | None, head: nn.Module) -> int:
    """The argument, else the size of the head's layers."""
    layers = _layers(head)
    found = None
    if layers:
        found = _size(layers[-1], "out") if name == "num_classes" else _size(layers[0], "in")
    # With several layers, the argument may name another one.
    if given is not None and found not in (None, given) and len(layers) == 1:
        if name == "num_classes" and found == 1:
            check_int(name, found, least=2)
        raise ValueError(f"{name} must be {found}, as in the head, or None, got {given}")
    size = found if given is None else given
    if size is None:
        raise ValueError(
            f"{name} must be given: head {type(head).__name__} has no layer that defines it; "
            "a lazy layer defines it after its first batch"
        )
    return size


def _softmax_loss(logits: Tensor, target: Tensor, separate: SeparateLoss) -> Tensor:
    """Softmax loss of logits `(*, C)`, in float32 or wider."""
    logits = logits.reshape(-1, separate.num_classes)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weight = separate.weight
    options: dict[str, Any] = {
        "weight": None if weight is None else weight.to(logits.dtype),
        "reduction": separate.reduction,
        "label_smoothing": separate.label_smoothing,
    }
    if target.is_floating_point():
        target = target.reshape(logits.shape).to(logits.dtype)
    else:
        target = target.reshape(-1).long()
        # Raises a clearer error for labels out of range than cross_entropy.
        mask_ignored(target, separate.num_classes, separate.ignore_index)
        options["ignore_index"] = separate.ignore_index
    return nn.functional.cross_entropy(logits, target, **options)
