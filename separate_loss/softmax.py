"""Softmax loss plus separate loss, on the head of a model that returns logits only."""

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from separate_loss._checks import (
    CenterInit,
    CenterUpdate,
    Reduction,
    check_batch,
    check_entered,
    check_rate,
    check_vectors,
    split_ignored,
)
from separate_loss._watch import Pass, Watch
from separate_loss.modules import SeparateLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from separate_loss.distributed import Processes

__all__ = ["SoftmaxSeparateLoss", "SoftmaxSeparateTerms"]


class SoftmaxSeparateTerms(NamedTuple):
    """The terms of a step of Eq. 9, detached scalars; intra is a mean, whatever the reduction.

    Examples:
        >>> head = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.zeros_(head.weight)
        >>> criterion = SoftmaxSeparateLoss(head, center_update="none", center_init=torch.eye(2))
        >>> loss = criterion(head(torch.eye(2)), torch.tensor([0, 1]))
        >>> criterion.last_terms
        SoftmaxSeparateTerms(softmax=tensor(0.6931), intra=tensor(0.), inter=tensor(0.5000))

    """

    softmax: Tensor
    intra: Tensor
    inter: Tensor


class SoftmaxSeparateLoss(nn.Module):
    r"""Softmax loss plus separate loss (Eq. 9), for a model that returns logits only.

    $$ L = L_s + \lambda L_{sep} \tag{9} $$

    It watches what enters `head` and takes that as the features of the logits that it is called
    with. Neither the model nor its `state_dict`, copies or pickles change. Each call needs a
    forward pass of its own before it; what was watched is let go with the call.

    Args:
        head: the module that turns features `(*, d)` into logits `(*, C)`, as the model's last
            `torch.nn.Linear`; its first argument is watched.
        separate_weight: lambda, finite and not negative.
        num_classes: C; None takes `head.out_features`, or else the size of the first logits.
        feature_dim: d; None takes `head.in_features`, or else the size of the first features.
        label_smoothing: as in `torch.nn.functional.cross_entropy`, in both terms; in [0, 1].
        center_update, center_lr, center_init, dtype: as in `SeparateLoss`.
        weight, ignore_index, reduction: as in `SeparateLoss`, in both terms.
        processes: as in `SeparateLoss`.
        device: of the centers; None takes the head's.

    Shape:
        logits `(*, C)` and target `(*)` or `(*, C)`, to a scalar, or `(*)` for
        ``reduction="none"``.

    Attributes:
        separate: the `SeparateLoss` within, with its `centers`; from the first call or
            checkpoint on where neither the head nor an argument told its sizes.
        last_terms: softmax loss (its mean for ``reduction="none"``), intra- and inter-class loss of
            the last call, for logging; None before any.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of its range; in a call also,
            logits and features that do not belong together.
        RuntimeError: called without a fresh forward pass of the head, or after one that recorded
            no gradients.

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
        processes: "ProcessGroup | Processes" = "all",
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
        self._build = partial(
            SeparateLoss,
            center_update=center_update,
            center_lr=center_lr,
            center_init=center_init,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            processes=processes,
            dtype=dtype,
        )
        num_classes = _told("num_classes", num_classes, head, "out_features")
        feature_dim = _told("feature_dim", feature_dim, head, "in_features")
        self._sizes = num_classes, feature_dim
        self._device = device
        if num_classes is not None and feature_dim is not None:
            self._complete(num_classes, feature_dim, device)
        elif center_update == "gradient":
            raise ValueError(
                "num_classes and feature_dim must be given for center_update='gradient', as head "
                f"does not tell them, got head {type(head).__name__}"
            )
        else:
            # Refuses now what needs no sizes to be refused.
            self._build(
                2 if num_classes is None else num_classes,
                1 if feature_dim is None else feature_dim,
                center_init=center_init if isinstance(center_init, str) else None,
                weight=None,
                device="meta",
            )
        self._watch: Watch | None = None
        self._unwatch: weakref.finalize[Any, Any] | None = None
        self.watch(head)

    def watch(self, head: nn.Module) -> None:
        """Watches `head` in place of any other; a copied or unpickled loss needs it once."""
        if not isinstance(head, nn.Module):
            raise TypeError(f"head must be a torch.nn.Module, got {type(head).__name__}")
        self.unwatch()
        self._watch = Watch()
        # The hooks go with the loss, not with the head.
        self._unwatch = weakref.finalize(self, self._watch.on(head))

    def unwatch(self) -> None:
        """Leaves the head as it was before; the loss cannot be called until `watch`."""
        if self._unwatch is not None:
            self._unwatch()
        self._watch = self._unwatch = None

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits that come from a forward pass of the watched head.

        They may be the head's output or anything computed from it, sample by sample in the same
        order, also after further passes.
        """
        check_vectors("logits", logits)
        entered = self._take(logits)
        features = entered.features
        num_classes = self._sizes[0] or logits.shape[-1]
        check_batch(logits, target, num_classes, name="logits")
        check_entered(features, logits, num_classes, self._sizes[1])
        if "separate" not in self._modules:
            device = features.device if self._device is None else self._device
            self._complete(num_classes, features.shape[-1], device)
        separate = self.separate
        softmax = _softmax_loss(logits, target, separate, self.label_smoothing)
        # Last, so that bad input has left the centers where they were.
        with torch.set_grad_enabled(torch.is_grad_enabled() and entered.recorded):
            loss: Tensor = separate(
                features.reshape(*logits.shape[:-1], separate.feature_dim),
                _smooth(target, separate, self.label_smoothing),
            )
        if separate.last_terms is not None:
            self.last_terms = SoftmaxSeparateTerms(softmax.detach().mean(), *separate.last_terms)
        return softmax.reshape(loss.shape) + self.separate_weight * loss

    def _take(self, logits: Tensor) -> Pass:
        if self._watch is None:
            raise RuntimeError("this loss watches no head; call watch(head) first")
        entered = self._watch.take(logits)
        if entered is None:
            raise RuntimeError(
                "the watched head has had no forward pass since the last call that these logits "
                "came from; run the model once before each call, and create the loss before a "
                "compiled model first runs"
            )
        if not entered.recorded and torch.is_grad_enabled() and logits.requires_grad:
            raise RuntimeError(
                "the watched head ran without recording gradients, so none would reach its "
                "features; run the model with gradients on, and use_reentrant=False in "
                "torch.utils.checkpoint"
            )
        if entered.version is not None and entered.features._version != entered.version:
            raise RuntimeError(
                "the head's input was changed in place after it had entered the head; use "
                "operators that are not in place, as torch.nn.ReLU(inplace=False)"
            )
        return entered

    def _complete(
        self, num_classes: int, feature_dim: int, device: torch.device | str | int | None
    ) -> None:
        # A first batch in inference mode must not make centers that cannot be trained.
        with torch.inference_mode(False):
            self.separate = self._build(num_classes, feature_dim, device=device)
        del self._build  # It holds starting values and class weights.
        self.separate.train(self.training)
        self._sizes = num_classes, feature_dim

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """A checkpoint tells the sizes where no batch has yet."""
        centers = state_dict.get(f"{prefix}separate.centers")
        if "separate" not in self._modules and isinstance(centers, Tensor) and centers.ndim == 2:
            num_classes, feature_dim = self._sizes
            self._complete(
                num_classes or centers.shape[0],
                feature_dim or centers.shape[1],
                centers.device if self._device is None else self._device,
            )
        super()._load_from_state_dict(state_dict, prefix, *others)

    def __getstate__(self) -> dict[str, Any]:
        """Without the watch: a copy watches no head."""
        return {
            **super().__getstate__(),  # type: ignore[no-untyped-call]
            "_watch": None,
            "_unwatch": None,
        }

    def extra_repr(self) -> str:
        """The arguments as they are in force, for `repr`."""
        return (
            f"separate_weight={self.separate_weight}, label_smoothing={self.label_smoothing}, "
            f"watching={self._watch is not None}"
        )


def _told(name: str, value: int | None, head: nn.Module, attribute: str) -> int | None:
    """A size as the argument or the head tells it; a lazy head tells 0, and so nothing."""
    told = getattr(head, attribute, None) or None
    if value is not None and isinstance(told, int) and told != value:
        raise ValueError(f"{name} must be {told}, the head's {attribute}, or None, got {value}")
    return told if value is None else value


def _softmax_loss(
    logits: Tensor, target: Tensor, separate: SeparateLoss, label_smoothing: float
) -> Tensor:
    """L_s of class-last logits `(*, C)`, in float32 or wider."""
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
