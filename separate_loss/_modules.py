"""The loss as a module that owns its centers."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from separate_loss._batch import Options
from separate_loss._checks import (
    CENTER_UPDATES,
    CenterInit,
    CenterUpdate,
    Form,
    Reduction,
    check_center_init,
    check_center_lr,
    check_choice,
    check_initialized,
    check_int,
    check_weight,
)
from separate_loss._distributed import (
    all_reduce_gradient,
    broadcast_centers_,
    check_process_group,
    resolve_group,
)
from separate_loss._step import run_step
from separate_loss._torch import compiler_moves_buffers, not_compiled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["SeparateLoss", "Terms"]


class Terms(NamedTuple):
    """The two terms of a step, and how many classes had a center; detached scalars.

    `intra` is a mean under every reduction.

    Examples:
        >>> criterion = SeparateLoss(2, 2, center_update="none", center_init=torch.eye(2))
        >>> loss = criterion(torch.eye(2), torch.tensor([0, 1]))
        >>> criterion.last_terms
        Terms(intra=tensor(0.), inter=tensor(0.2500), num_centers=tensor(2))

    """

    intra: Tensor
    inter: Tensor
    num_centers: Tensor


class SeparateLoss(nn.Module):
    r"""The separate loss (Eq. 4) with its own centers, used beside softmax loss.

    $$ L = L_s + \lambda (L_{intra} + L_{inter}) \tag{9} $$

    Use lambda = 1 with the default form, and 0.9 with ``form="paper"``, as in the paper. With SGD
    and without normalisation layers, a lambda of 3 or more makes features longer from step to step:
    lower the learning rate or clip gradients.

    Args:
        num_classes: C, at least 2.
        feature_dim: d, at least 1.
        form: ``"simplex"`` or ``"paper"``, as in `separate_loss.functional.separate_loss`.
        center_update: ``"forward"`` keeps the centers in a buffer and updates them by Eq. 8 at the
            end of each `forward`, in training mode with gradients enabled, as BatchNorm updates its
            statistics. No optimizer is needed. ``"gradient"`` makes the centers a parameter for an
            optimizer. ``"none"`` leaves the buffer to the caller.
        center_lr: alpha of Eq. 8, for ``center_update="forward"``; finite and not negative. None
            takes a tenth of the number of samples in the step, over all processes, within the bound
            of `separate_loss.functional.update_centers`, so that centers follow their classes
            equally fast at every batch size.
        center_init: the initial centers. ``"features"``: zero, until the first samples of a class
            set its center to their mean direction; under class probabilities, the samples for
            which it is the most probable class, by their probabilities. Only for the forward
            update, and its default. ``"sphere"``: random directions of norm 1, the default of the
            other updates. Or a tensor (C, d) of finite values, whose zero rows behave as under
            ``"features"``.
        weight, ignore_index, reduction, label_smoothing: as in
            `separate_loss.functional.separate_loss`. Class weights and label smoothing apply to the
            loss, not to the forward update.
        process_group: the processes of torch.distributed, if it is initialised, whose samples
            update the centers; None takes all. All processes start from rank 0's centers and stay
            identical. Each of them must make every training call and load every checkpoint.
        sync_centers: False lets each process update centers of its own; within
            DistributedDataParallel that needs ``broadcast_buffers=False``.
        device, dtype: of the centers; in half precision small updates would be rounded away.

    Shape:
        features `(*, d)` and target `(*)` or `(*, C)`, as the function takes them, to a scalar, or
        `(*)` for ``reduction="none"``.

    Attributes:
        centers: (C, d), buffer or parameter; in the `state_dict` under the same name in all modes.
            The forward update changes them in place: clone them to use them in your own graph.
        last_terms: intra- and inter-class loss of the last call and the number of classes that had
            a center, for logging; None before that.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of its range.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> criterion = SeparateLoss(num_classes=3, feature_dim=8)
        >>> features, labels = torch.randn(16, 8, requires_grad=True), torch.arange(16) % 3
        >>> logits = torch.nn.functional.linear(features, torch.randn(3, 8))
        >>> loss = torch.nn.functional.cross_entropy(logits, labels)
        >>> loss = loss + criterion(features, labels)
        >>> loss.backward()

    Source:
        Li et al., ACML 2019, PMLR 101:897-911. The paper gives neither `center_lr` nor starting
        values; docs/theory.md explains the choice.

    """

    centers: Tensor
    weight: Tensor | None

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        *,
        form: Form = "simplex",
        center_update: CenterUpdate = "forward",
        center_lr: float | None = None,
        center_init: CenterInit | Tensor | None = None,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        process_group: "ProcessGroup | None" = None,
        sync_centers: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("num_classes", num_classes, least=2)
        check_int("feature_dim", feature_dim, least=1)
        check_choice("center_update", center_update, CENTER_UPDATES)
        check_center_lr(center_lr)
        Options(form, None, ignore_index, reduction, label_smoothing).check()
        check_process_group(process_group, sync_centers)
        if weight is not None:
            check_weight(weight, num_classes)
        if center_init is None:
            center_init = "features" if center_update == "forward" else "sphere"
        check_center_init(center_init, (num_classes, feature_dim), center_update)

        self.num_classes = num_classes
        self.feature_dim = feature_dim
        self.form: Form = form
        self.center_update = center_update
        self.center_lr = center_lr
        self.center_init = center_init if isinstance(center_init, str) else "tensor"
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.label_smoothing = label_smoothing
        self.process_group = process_group
        self.sync_centers = sync_centers
        self.last_terms: Terms | None = None

        centers = torch.empty(num_classes, feature_dim, device=device, dtype=dtype)
        if center_update == "gradient":
            self.centers = nn.Parameter(centers)
        else:
            self.register_buffer("centers", centers)
        self.register_buffer("weight", None if weight is None else weight.to(centers))
        self._initial = center_init, weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Resets the centers and the class weights to their initial values."""
        center_init, weight = self._initial
        with torch.no_grad():
            init_centers_(self.centers, center_init)
            if weight is not None and self.weight is not None:
                self.weight.copy_(weight)
        # A module on the meta device has no values until a checkpoint is loaded.
        self._initialized = not self.centers.is_meta
        self._checked = self._synced = False

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        """Returns the loss; then, in training, updates the centers."""
        return self._step(features, target)

    def _step(self, features: Tensor, target: Tensor, *, may_update: bool = True) -> Tensor:
        updating = may_update and self.training and self.center_update == "forward"
        updating = updating and torch.is_grad_enabled()
        if updating and torch.compiler.is_compiling() and not compiler_moves_buffers():
            return _uncompiled(self._compute, features, target, updating)
        return self._compute(features, target, updating)

    def _compute(self, features: Tensor, target: Tensor, updating: bool) -> Tensor:
        if not self._checked and not torch.compiler.is_compiling():
            check_initialized("centers", self.centers, self._initialized)
            self._checked = not self.centers.is_meta
        learning = torch.is_grad_enabled() and self.centers.requires_grad
        group = None
        if updating or learning:
            group = resolve_group(self.process_group, self.sync_centers)
        centers = self.centers if group is None else self._synced_centers(group)
        step = run_step(features, target, centers, self._options(), group if updating else None)
        self.last_terms = Terms(step.intra.detach(), step.inter.detach(), step.num_centers)
        if updating:
            step.update_(self.centers, self.center_lr, start_zeros=True)
        return step.loss

    def _options(self) -> Options:
        return Options(
            self.form, self.weight, self.ignore_index, self.reduction, self.label_smoothing
        )

    def _synced_centers(self, group: "ProcessGroup") -> Tensor:
        if not self._synced:
            broadcast_centers_(self.centers, group)
            self._synced = True
        if self.centers.requires_grad:
            return all_reduce_gradient(self.centers, group)
        return self.centers

    def __getstate__(self) -> dict[str, Any]:
        """A copy broadcasts its centers again before it uses them."""
        return {
            **super().__getstate__(),  # type: ignore[no-untyped-call]
            "_synced": False,
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> "SeparateLoss":
        # A process group cannot be copied.
        memo[id(self.process_group)] = self.process_group
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # type: ignore[no-untyped-call]
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.process_group is not None:
            raise TypeError(
                "process_group is a ProcessGroup, which holds connections and cannot be pickled; "
                "save the state_dict(), or set process_group to None before"
            )
        return super().__reduce_ex__(protocol)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        self._synced = self._checked = False
        self._initialized = self._initialized or f"{prefix}centers" in state_dict
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        parts = [
            f"num_classes={self.num_classes}",
            f"feature_dim={self.feature_dim}",
            f"form={self.form!r}",
            f"center_update={self.center_update!r}",
            f"center_init={self.center_init!r}",
            f"reduction={self.reduction!r}",
        ]
        if self.center_update == "forward":
            parts.insert(4, f"center_lr={self.center_lr}")
        if self.label_smoothing > 0:
            parts.append(f"label_smoothing={self.label_smoothing}")
        if self.ignore_index != -100:
            parts.append(f"ignore_index={self.ignore_index}")
        if self.weight is not None:
            parts.append("weight=...")
        if self.process_group is not None:
            parts.append(f"process_group={self.process_group!r}")
        if not self.sync_centers:
            parts.append("sync_centers=False")
        return ", ".join(parts)


@not_compiled
def _uncompiled(compute: Callable[..., Tensor], *arguments: Any) -> Tensor:
    # The mark alone would leave what `compute` calls to the compiler.
    result: Tensor = torch.compiler.disable(compute)(*arguments)
    return result


def init_centers_(
    centers: Tensor, init: CenterInit | Tensor, generator: torch.Generator | None = None
) -> None:
    """Sets centers to their initial values, in place."""
    if isinstance(init, Tensor):
        centers.copy_(init)
    elif init == "features":
        centers.zero_()
    else:
        nn.init.normal_(centers, generator=generator)
        centers.div_(torch.linalg.vector_norm(centers, dim=-1, keepdim=True))
