"""The loss as modules: with centers of its own, and with softmax loss on a model's head."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from separate_loss._checks import (
    CenterInit,
    CenterUpdate,
    Reduction,
    check_batch,
    check_centers,
    check_choice,
    check_entered,
    check_int,
    check_rate,
    check_weight,
    split_ignored,
)
from separate_loss.functional import Reading, move_centers_, read, reduce

__all__ = ["SeparateLoss", "SoftmaxSeparateLoss", "SoftmaxSeparateTerms", "Terms"]


class Terms(NamedTuple):
    """The two terms of a step, detached scalars; intra is the mean, whatever the reduction."""

    intra: Tensor
    inter: Tensor


class SeparateLoss(nn.Module):
    r"""The separate loss (Eq. 4) with centers of its own, used beside softmax loss.

    .. math:: L = L_s + \lambda (L_{intra} + L_{inter}) \tag{9}

    with lambda = 0.9 in the paper. Take features where they can be negative, from a linear layer or
    before an activation; after ReLU centers cannot follow the class means and push them apart.

    Args:
        num_classes: C, at least 2.
        feature_dim: d, at least 1.
        center_update: ``"paper"`` keeps the centers in a buffer and moves them by Eq. 8 at the end
            of each `forward`, in training mode with gradients on, as BatchNorm does with its
            statistics: nothing to hand to an optimizer. ``"gradient"`` makes them a parameter, for
            an optimizer to move. ``"none"`` leaves the buffer to the caller.
        center_lr: alpha of Eq. 8, for ``center_update="paper"``; finite and not negative.
        center_init: where centers start. ``"features"``: at zero, and from there to the mean
            direction of the first features of their class; it needs the paper's update, whose
            default it is. ``"sphere"``: random directions of norm 1, the default otherwise.
            ``"normal"``: N(0, 1). ``"uniform"``: U(0, 1). Or a tensor (C, d) of finite values.
        weight, ignore_index, reduction: as in :func:`separate_loss.functional.separate_loss`.
            Class weights act on the loss, not on the paper's update.
        device, dtype: of the centers; keep them in float32 or wider for small steps to count.

    Shape:
        features (*, d) and target (*) or (*, C), as the function takes them, to a scalar, or (*)
        for ``reduction="none"``.

    Attributes:
        centers: (C, d), buffer or parameter; in the `state_dict` under the same name in all modes.
        last_terms: intra- and inter-class loss of the last call, for logging; None before any.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of its range.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> criterion = SeparateLoss(num_classes=3, feature_dim=8)
        >>> features, labels = torch.randn(16, 8, requires_grad=True), torch.arange(16) % 3
        >>> logits = torch.nn.functional.linear(features, torch.randn(3, 8))
        >>> loss = torch.nn.functional.cross_entropy(logits, labels)
        >>> loss = loss + 0.9 * criterion(features, labels)
        >>> loss.backward()

    Source:
        Li et al., ACML 2019, PMLR 101:897-911. The paper gives neither `center_lr` nor starting
        values; docs/centers.md has the measurements behind these.

    """

    centers: Tensor
    weight: Tensor | None

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        *,
        center_update: CenterUpdate = "paper",
        center_lr: float = 10.0,
        center_init: CenterInit | Tensor | None = None,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("num_classes", num_classes, least=2)
        check_int("feature_dim", feature_dim, least=1)
        check_choice("center_update", center_update, CenterUpdate)
        check_rate("center_lr", center_lr)
        check_int("ignore_index", ignore_index)
        check_choice("reduction", reduction, Reduction)
        if weight is not None:
            check_weight(weight, num_classes)
        if center_init is None:
            center_init = "features" if center_update == "paper" else "sphere"

        self.num_classes = num_classes
        self.feature_dim = feature_dim
        self.center_update = center_update
        self.center_lr = center_lr
        self.center_init = center_init if isinstance(center_init, str) else "tensor"
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.last_terms: Terms | None = None

        centers = torch.empty(num_classes, feature_dim, device=device, dtype=dtype)
        _start(centers, center_init, center_update)
        if center_update == "gradient":
            self.centers = nn.Parameter(centers)
        else:
            self.register_buffer("centers", centers)
        self.register_buffer("weight", None if weight is None else weight.to(centers))

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        """The loss under the centers as they are; then, where they should, the centers move."""
        reading = read(features, target, self.centers, self.weight, self.ignore_index)
        intra, inter, mass = reading.intra, reading.inter, reading.batch.mass
        mean = reduce(intra, mass, None, "mean")
        self.last_terms = Terms(mean.detach(), inter.detach())
        if self.center_update == "paper" and self.training and torch.is_grad_enabled():
            self._move(reading)
        if self.reduction == "mean":
            return mean + inter
        loss = reduce(intra, mass, inter, self.reduction)
        return loss.reshape(features.shape[:-1]) if self.reduction == "none" else loss

    @torch.no_grad()
    def _move(self, reading: Reading) -> None:
        # The buffer itself, or a copy of it in the type that was computed in.
        centers = reading.batch.centers
        start = self.center_init == "features"
        move_centers_(centers, reading, self.center_lr, start=start)
        if centers is not self.centers:
            self.centers.copy_(centers)

    def extra_repr(self) -> str:
        """The arguments as they are in force, for `repr`."""
        parts = [
            f"num_classes={self.num_classes}",
            f"feature_dim={self.feature_dim}",
            f"center_update={self.center_update!r}",
            f"center_init={self.center_init!r}",
            f"reduction={self.reduction!r}",
        ]
        if self.center_update == "paper":
            parts.insert(3, f"center_lr={self.center_lr}")
        if self.ignore_index != -100:
            parts.append(f"ignore_index={self.ignore_index}")
        if self.weight is not None:
            parts.append("weight=...")
        return ", ".join(parts)


class SoftmaxSeparateTerms(NamedTuple):
    """The terms of a step of Eq. 9, detached scalars; intra is a mean, whatever the reduction."""

    softmax: Tensor
    intra: Tensor
    inter: Tensor


class SoftmaxSeparateLoss(nn.Module):
    r"""Softmax loss plus separate loss (Eq. 9), for a model that returns logits only.

    .. math:: L = L_s + \lambda L_{sep} \tag{9}

    It watches what enters `head` and takes that as the features of the logits that it is called
    with. Neither the model nor its `state_dict`, copies or pickles change. Each call needs a
    forward pass of its own before it; what was watched is let go with the call.

    Args:
        head: the module that turns features (*, d) into logits (*, C), as the model's last
            `torch.nn.Linear`; its first positional argument is watched.
        separate_weight: lambda, finite and not negative.
        num_classes: C; None takes `head.out_features`.
        feature_dim: d; None takes `head.in_features`.
        label_smoothing: as in `torch.nn.functional.cross_entropy`, in both terms; in [0, 1].
        center_update, center_lr, center_init, dtype: as in :class:`SeparateLoss`.
        weight, ignore_index, reduction: as in :class:`SeparateLoss`, in both terms.
        device: of the centers; None takes the head's.

    Shape:
        logits (*, C) and target (*) or (*, C), to a scalar, or (*) for ``reduction="none"``.

    Attributes:
        separate: the :class:`SeparateLoss` within, with its `centers`.
        last_terms: softmax loss (its mean for ``reduction="none"``), intra- and inter-class loss of
            the last call, for logging; None before any.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of its range, or neither the
            head nor an argument tells a size; in a call also, logits and features that do not
            belong together.
        RuntimeError: called without a fresh forward pass of the head.

    Example:
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
        separate_weight: float = 0.9,
        num_classes: int | None = None,
        feature_dim: int | None = None,
        label_smoothing: float = 0.0,
        center_update: CenterUpdate = "paper",
        center_lr: float = 10.0,
        center_init: CenterInit | Tensor | None = None,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(head, nn.Module):
            raise TypeError(f"head must be a torch.nn.Module, got {type(head).__name__}")
        check_rate("separate_weight", separate_weight)
        check_rate("label_smoothing", label_smoothing)
        if label_smoothing > 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
        if device is None:
            device = next((parameter.device for parameter in head.parameters()), None)
        self.separate_weight = separate_weight
        self.label_smoothing = label_smoothing
        self.last_terms: SoftmaxSeparateTerms | None = None
        self.separate = SeparateLoss(
            _size("num_classes", num_classes, head, "out_features"),
            _size("feature_dim", feature_dim, head, "in_features"),
            center_update=center_update,
            center_lr=center_lr,
            center_init=center_init,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            device=device,
            dtype=dtype,
        )
        self._watch: _Watch | None = None
        self._unwatch: weakref.finalize[Any, Any] | None = None
        self.watch(head)

    def watch(self, head: nn.Module) -> None:
        """Watches `head` in place of any other; a copied or unpickled loss needs it once."""
        self.unwatch()
        self._watch = _Watch()
        handle = head.register_forward_pre_hook(self._watch)
        # The hook goes with the loss, not with the head.
        self._unwatch = weakref.finalize(self, handle.remove)

    def unwatch(self) -> None:
        """Leaves the head as it was before; the loss cannot be called until `watch`."""
        if self._unwatch is not None:
            self._unwatch()
        self._watch = self._unwatch = None

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits that come straight from a forward pass of the watched head."""
        features = self._take_features()
        separate = self.separate
        check_batch(logits, target, separate.num_classes, name="logits")
        check_entered(features, logits, separate.num_classes, separate.feature_dim)
        softmax = _softmax_loss(logits, target, separate, self.label_smoothing)
        # Last, so that bad input has left the centers where they were.
        loss: Tensor = separate(
            features.reshape(*logits.shape[:-1], separate.feature_dim),
            _smooth(target, separate, self.label_smoothing),
        )
        if separate.last_terms is not None:
            self.last_terms = SoftmaxSeparateTerms(softmax.detach().mean(), *separate.last_terms)
        return softmax.reshape(loss.shape) + self.separate_weight * loss

    def _take_features(self) -> Tensor:
        if self._watch is None:
            raise RuntimeError("this loss watches no head; call watch(head) first")
        features, self._watch.features = self._watch.features, None
        if features is None:
            raise RuntimeError(
                "the watched head has had no forward pass since the last call; run the model once "
                "before each call, and create the loss before a compiled model first runs"
            )
        return features

    def __getstate__(self) -> dict[str, Any]:
        """Without the watch: a copy watches no head."""
        return {**vars(self), "_watch": None, "_unwatch": None}

    def extra_repr(self) -> str:
        """The arguments as they are in force, for `repr`."""
        return (
            f"separate_weight={self.separate_weight}, label_smoothing={self.label_smoothing}, "
            f"watching={self._watch is not None}"
        )


class _Watch:
    """A forward pre-hook that keeps what enters a module until it is taken."""

    features: Tensor | None = None

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.features = inputs[0] if inputs else None

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles of the watched model get a hook that does nothing and needs nothing
        # but Python: `{}.get(module, inputs)` gives the inputs back as they came.
        return getattr, ({}, "get")


def _size(name: str, value: int | None, head: nn.Module, attribute: str) -> int:
    if value is None:
        value = getattr(head, attribute, None)
        if value is None:
            raise ValueError(
                f"{name} must be given, as head has no {attribute}, got head {type(head).__name__}"
            )
    return value


def _softmax_loss(
    logits: Tensor, target: Tensor, separate: SeparateLoss, label_smoothing: float
) -> Tensor:
    """L_s of class-last logits (*, C), in float32 or wider."""
    logits = logits.reshape(-1, separate.num_classes)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weight = separate.weight
    options: dict[str, Any] = {
        "weight": None if weight is None else weight.to(logits.dtype),
        "reduction": separate.reduction,
        "label_smoothing": label_smoothing,
    }
    if target.is_floating_point():
        target = target.reshape(logits.shape).to(logits.dtype)
    else:
        target = target.reshape(-1).long()
        # Says more of a label out of range than cross_entropy does.
        split_ignored(target, separate.num_classes, separate.ignore_index)
        options["ignore_index"] = separate.ignore_index
    return nn.functional.cross_entropy(logits, target, **options)


def _smooth(target: Tensor, separate: SeparateLoss, label_smoothing: float) -> Tensor:
    """Each sample's share of its classes, mixed with an equal share of all."""
    if label_smoothing == 0:
        return target
    num_classes, kept = separate.num_classes, None
    if not target.is_floating_point():
        index, kept = split_ignored(target, num_classes, separate.ignore_index)
        target = nn.functional.one_hot(index, num_classes).to(separate.centers.dtype)
    smooth = target * (1 - label_smoothing) + label_smoothing / num_classes
    # A row of zeros has no weight.
    return smooth if kept is None else smooth * kept.unsqueeze(-1)


def _start(centers: Tensor, init: CenterInit | Tensor, update: CenterUpdate) -> None:
    """Fills new centers in place."""
    if isinstance(init, Tensor):
        check_centers("center_init", init)
        if init.shape != centers.shape:
            raise ValueError(
                f"center_init must have shape {tuple(centers.shape)}, got {tuple(init.shape)}"
            )
        if not bool(init.isfinite().all()):
            raise ValueError("center_init must hold finite values, got NaN or infinity")
        centers.copy_(init)
        return
    check_choice("center_init", init, CenterInit)
    match init:
        case "features":
            if update != "paper":
                raise ValueError(
                    "center_init='features' needs center_update='paper', which starts the centers, "
                    f"got center_update={update!r}"
                )
            centers.zero_()
        case "sphere":
            nn.init.normal_(centers)
            centers.div_(torch.linalg.vector_norm(centers, dim=-1, keepdim=True))
        case "normal":
            nn.init.normal_(centers)
        case "uniform":
            nn.init.uniform_(centers)
