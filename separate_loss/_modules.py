"""The loss as a module that owns its centers."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from separate_loss import _checks, _distributed, _initial
from separate_loss._batch import Options
from separate_loss._checks import CenterInit, CenterUpdate, Form, Reduction
from separate_loss._step import run_step
from separate_loss._torch import compiler_moves_buffers, run_uncompiled, unwrapped, version_of
from separate_loss._tracing import has_values

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


class SeparateOptions(TypedDict, total=False):
    """The keyword arguments of `SeparateLoss`."""

    form: Form
    center_update: CenterUpdate
    center_lr: float | None
    center_init: CenterInit | Tensor | None
    weight: Tensor | None
    ignore_index: int
    reduction: Reduction
    label_smoothing: float
    process_group: "ProcessGroup | None"
    sync_centers: bool
    device: torch.device | str | int | None
    dtype: torch.dtype | None


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
        center_lr: alpha of Eq. 8, for ``center_update="forward"``, as in
            `separate_loss.functional.update_centers`; None counts the samples of all processes, so
            that centers follow their classes equally fast at every batch size.
        center_init: the initial centers. ``"features"``: zero, until the first samples of a class
            set its center to their mean direction; under class probabilities, the samples for
            which it is the most probable class, by their probabilities. Only for the forward
            update, and its default. ``"sphere"``: random directions of norm 1, the default of the
            other updates. Or a tensor or NumPy array (C, d), which is copied. The forward update
            takes the directions of its rows, and starts rows that are zero or not finite as under
            ``"features"``; a parameter must have none.
        weight, ignore_index, reduction, label_smoothing: as in
            `separate_loss.functional.separate_loss`. Class weights and label smoothing apply to the
            loss, not to the forward update.
        process_group: the processes of torch.distributed, if it is initialised, whose samples
            update the centers; None takes all. All processes start from rank 0's centers and stay
            identical. Each of them must make every training call and load every checkpoint.
            ``"gradient"`` averages the gradient of the centers over them.
        sync_centers: False lets each process update centers of its own; within
            DistributedDataParallel that needs ``broadcast_buffers=False``.
        device, dtype: of the centers; in half precision small updates would be rounded away.

    Shape:
        features `(*, d)` and target `(*)` or `(*, C)` to a scalar, or `(*)` for
        ``reduction="none"``.

    Attributes:
        centers: (C, d), buffer or parameter; in the `state_dict` under the same name in all modes.
            The forward update changes them in place: clone them to use them in your own graph. The
            first call after others wrote them sets rows that are not finite to zero.
            `nn.Module.to_empty` gives centers from the meta device their initial values.
        last_terms: the `Terms` of the last call, for logging; None before that, and after a call
            under `torch.func.vmap`.
        center_lr: may be assigned later, for example in each epoch.

    Raises:
        TypeError, ValueError: an argument is of a wrong type, out of its range or without effect
            under `center_update`; in a call, `centers` or a setting that was assigned is wrong, or
            a setting is not the same in all processes.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> criterion = SeparateLoss(num_classes=3, feature_dim=8)
        >>> features, labels = torch.randn(16, 8, requires_grad=True), torch.arange(16) % 3
        >>> logits = torch.nn.functional.linear(features, torch.randn(3, 8))
        >>> softmax = torch.nn.functional.cross_entropy(logits, labels)
        >>> (softmax + criterion(features, labels)).backward()

    Source:
        Li et al., ACML 2019, PMLR 101:897-911. The paper gives neither `center_lr` nor starting
        values; docs/theory.md explains the choice.
    """

    centers: Tensor
    weight: Tensor | None
    _init: CenterInit | Tensor
    _seen: _initial.Seen | None

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
        num_classes = _checks.check_int("num_classes", num_classes, least=2)
        feature_dim = _checks.check_int("feature_dim", feature_dim, least=1)
        _checks.check_choice("center_update", center_update, _checks.CENTER_UPDATES)
        Options(form, None, ignore_index, reduction, label_smoothing).check()
        _distributed.check_process_group(process_group, sync_centers)
        if center_update != "forward":
            _checks.check_no_effect("center_lr", center_lr, None, center_update)
        if center_update == "none":
            _checks.check_no_effect("process_group", process_group, None, center_update)
            _checks.check_no_effect("sync_centers", sync_centers, True, center_update)
        if center_init is None:
            center_init = "features" if center_update == "forward" else "sphere"
        weight = _initial.given_tensor(weight)
        if weight is not None:
            _checks.check_weight(weight, num_classes)

        self.num_classes = num_classes
        self.feature_dim = feature_dim
        self.form: Form = form
        self.center_update: CenterUpdate = center_update
        self.center_lr = _checks.check_center_lr(center_lr)
        self.ignore_index = int(ignore_index)
        self.reduction: Reduction = reduction
        self.label_smoothing = float(label_smoothing)
        self.process_group = process_group
        self.sync_centers = sync_centers
        self.last_terms: Terms | None = None
        self._target_read = False  # whether class probabilities were read, for a warning

        self._create_centers(center_init, device=device, dtype=dtype)
        self.center_init = "tensor" if isinstance(self._init, Tensor) else self._init
        self._init_weight = None if weight is None else weight.clone()
        weight = None if weight is None else weight.to(self.centers, copy=True)
        self.register_buffer("weight", weight)
        self.reset_parameters()

    def _create_centers(self, center_init: CenterInit | Tensor, **kind: Any) -> None:
        """Makes the centers, without values, and keeps their initial values."""
        shape = self.num_classes, self.feature_dim
        self._init = _initial.given_centers(center_init, shape, self.center_update)
        centers = torch.empty(shape, **kind)
        if self.center_update == "gradient":
            self.centers = nn.Parameter(centers)
        else:
            self.register_buffer("centers", centers)

    def reset_parameters(self) -> None:
        """Resets the centers and the class weights to their initial values."""
        with torch.no_grad():
            _initial.init_centers_(self.centers, self._init)
            if self._init_weight is not None and self.weight is not None:
                _initial.restore_(self.weight, self._init_weight)
        self._seen, self._synced = None, False

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        """Returns the loss; then, in training, updates the centers."""
        compiling, centers = torch.compiler.is_compiling(), self.centers
        updating = self.training and torch.is_grad_enabled() and self.center_update == "forward"
        soft = isinstance(target, Tensor) and target.is_floating_point()
        if (
            updating
            and torch.compiler.is_dynamo_compiling()
            and not compiler_moves_buffers(by_probabilities=soft)
        ):
            loss: Tensor = run_uncompiled(SeparateLoss.forward, self, features, target)
            return loss
        center_lr = _checks.check_center_lr(self.center_lr) if updating else None
        learning = torch.is_grad_enabled() and getattr(centers, "requires_grad", False)
        group = None
        if updating or learning:
            group = _distributed.resolve_group(self.process_group, self.sync_centers)
        if group is not None and not self._synced:
            self._synchronise(group)
        if not compiling:
            shape = self.num_classes, self.feature_dim
            self._seen = _initial.look_at_(centers, self._seen, shape, self.center_update)
        if group is not None and learning:
            centers = _distributed.all_reduce_gradient(centers, group)
        step = run_step(features, target, centers, self._options(), group if updating else None)
        if soft and not compiling and not self._target_read:
            self._target_read = _checks.warn_probabilities(target)
        found = (unwrapped(term.detach()) for term in (step.intra, step.inter, step.num_centers))
        terms = [term for term in found if term is not None]
        self.last_terms = Terms(*terms) if len(terms) == 3 else None
        if updating:
            step.update_(centers, center_lr, start_zeros=True)
            if not compiling:
                self._seen = _initial.seen_now(centers, self.center_update)
        return step.loss

    def _options(self) -> Options:
        return Options(
            self.form, self.weight, self.ignore_index, self.reduction, self.label_smoothing
        )

    def _synchronise(self, group: "ProcessGroup") -> None:
        if not torch.compiler.is_compiling():
            _distributed.check_own_parameter(self.centers)
            self._check_same_settings(group)
        _distributed.broadcast_centers_(self.centers, group)
        self._seen, self._synced = None, True

    def _check_same_settings(self, group: "ProcessGroup") -> None:
        settings = {
            "centers": f"{tuple(self.centers.shape)} of {self.centers.dtype}",
            "center_update": self.center_update,
            "center_lr": self.center_lr,
            **self._options()._replace(weight=None)._asdict(),
        }
        _distributed.check_same_settings(settings, self.centers.device, group)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SeparateLoss":
        was_meta = self.centers.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self.centers.is_meta:  # memory without values
            self.reset_parameters()
        return self

    @property
    def _is_hf_initialized(self) -> bool:
        """A mark that transformers sets last when it loads a module."""
        return bool(vars(self).get("_is_hf_initialized", False))

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        vars(self)["_is_hf_initialized"] = value
        centers = self.centers
        # It marks the tensors that it has loaded. Others are memory, unless someone wrote them.
        loaded = getattr(centers, "_is_hf_initialized", False)
        if value and not (loaded or centers.is_meta or version_of(centers)):
            self.reset_parameters()

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks at its centers and broadcasts them again before it uses them."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state = {**state, "_seen": None, "_synced": False}
        # Initial values that the centers still have are not stored twice.
        init, centers = self._init, self.centers
        if isinstance(init, Tensor) and has_values(init) and has_values(centers):
            state["_init"] = None if torch.equal(init.to(centers), centers) else init
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._init is None:
            self._init = self.centers.detach().clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> "SeparateLoss":
        memo[id(self.process_group)] = self.process_group  # which cannot be copied
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
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
        self._seen, self._synced = None, False
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        names = ["num_classes", "feature_dim", "form", "center_update", "center_init", "reduction"]
        if self.center_update == "forward":
            names.insert(4, "center_lr")
        defaults = {
            "label_smoothing": 0.0,
            "ignore_index": -100,
            "process_group": None,
            "sync_centers": True,
        }
        names += [name for name, default in defaults.items() if getattr(self, name) != default]
        parts = [f"{name}={getattr(self, name)!r}" for name in names]
        return ", ".join(parts if self.weight is None else [*parts, "weight=..."])
