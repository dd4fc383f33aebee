"""Softmax loss plus separate loss, for a model that returns only logits."""

import warnings
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn

from separate_loss import _checks, _features, _watch
from separate_loss._batch import compute_dtype, mask_ignored
from separate_loss._checks import dim_of
from separate_loss._modules import SeparateLoss, SeparateOptions, Terms
from separate_loss._torch import compiler_moves_buffers, run_uncompiled

__all__ = ["SoftmaxSeparateLoss", "SoftmaxSeparateTerms"]


class SoftmaxSeparateTerms(NamedTuple):
    """The terms of Eq. 9, and how many classes had a center; detached scalars.

    `intra` is a mean under every reduction, `softmax` also under ``reduction="none"``.

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

    A hook notes what enters `head`; the loss finds it again from the logits. Pass what the model
    returned, or a view, cast, scaling or shift of it; for everything else pass `features` too. The
    model's `state_dict` and its `torch.export` do not change.

    Args:
        head: the module that computes logits from its first argument, for example the model's last
            `torch.nn.Linear` (`(*, d)` to `(*, C)`) or convolution (`(N, d, *)` to `(N, C, *)`).
        separate: a ready loss instead of a new `SeparateLoss`: any module that takes features
            `(N, d)` and target, and returns a scalar. It is in training mode exactly when centers
            may move. If it has `last_terms` of type `Terms`, they are read; if it has `weight`,
            `ignore_index`, `reduction` or `label_smoothing`, the softmax loss takes them.
        separate_weight: lambda, finite and not negative; see `SeparateLoss`. May be assigned later,
            for example in each epoch.
        num_classes: C; None reads it from the last linear or convolutional layer in `head`.
        feature_dim: d; None reads it from the first such layer.
        class_dim: the dimension of C in the head's output and of d in its input: 1 or -1. None
            takes 1 for heads whose last such layer is a convolution, and -1 for others.
        options: of the new `SeparateLoss`; `weight`, `ignore_index`, `reduction` and
            `label_smoothing` apply to both terms, and `device` is the head's by default.

    Shape:
        logits `(N, C, *)` and target `(N, *)` or `(N, C, *)`, as in
        `torch.nn.functional.cross_entropy`, or class-last: logits `(*, C)` and target `(*)` or
        `(*, C)`. To a scalar, or the shape of class indices for ``reduction="none"``.

    Attributes:
        separate: the `SeparateLoss`, with its `centers`.
        last_terms: the `SoftmaxSeparateTerms` of the last call, for logging; None before the
            first, and if `separate` has none.

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

    separate: SeparateLoss

    def __init__(
        self,
        head: nn.Module,
        *,
        separate: nn.Module | None = None,
        separate_weight: float = 1.0,
        num_classes: int | None = None,
        feature_dim: int | None = None,
        class_dim: _checks.ClassDim | None = None,
        **options: Unpack[SeparateOptions],
    ) -> None:
        super().__init__()
        _checks.check_module("head", head)
        self._class_dim_given = class_dim is not None
        # Linear and convolutional layers, and other modules with the same size attributes.
        layers = [module for module in head.modules() if _size(module, "out") is not None]
        if class_dim is None:
            class_dim = 1 if layers and isinstance(layers[-1], _watch.CONVOLUTIONS) else -1
        _checks.check_choice("class_dim", class_dim, _checks.CLASS_DIMS)
        self.separate_weight = _checks.check_nonnegative("separate_weight", separate_weight)
        self.class_dim = class_dim
        self.num_classes = _size_of("num_classes", num_classes, layers, separate)
        self.feature_dim = _size_of("feature_dim", feature_dim, layers, separate)
        self.last_terms: SoftmaxSeparateTerms | None = None
        if separate is None:
            if options.get("device") is None:
                options["device"] = next((one.device for one in head.parameters()), None)
            separate = SeparateLoss(self.num_classes, self.feature_dim, **options)
        elif options:
            given = ", ".join(options)
            raise TypeError(f"separate is a ready loss, so {given} must be given to it instead")
        _checks.check_module("separate", separate)
        self.separate = separate  # type: ignore[assignment]
        self._warned: set[str] = set()
        self._heads: list[_watch.Head] = []
        self.watch(head)

    def watch(self, head: nn.Module) -> None:
        """Accepts logits of `head` too, from its next forward pass on."""
        _checks.check_module("head", head)
        watched = _watch.watch(head, self)
        self._heads = list(dict.fromkeys([*self._heads, watched]))

    def unwatch(self, head: nn.Module | None = None) -> None:
        """Accepts logits of `head`, or of any head, no more; calls then need `features`.

        Removes the hook if no other loss watches: `torch.jit.script` refuses hooks, and a pickle of
        the whole model with one needs this package.
        """
        left = self._heads if head is None else _watch.heads_of(head)
        for watched in left:
            _watch.leave(watched, id(self), head)
        self._heads = [watched for watched in self._heads if watched not in left]

    def forward(self, logits: Tensor, target: Tensor, *, features: Tensor | None = None) -> Tensor:
        """Returns the loss of logits of the watched head; then, in training, updates the centers.

        Args:
            logits: those of one forward pass of the head, with the samples in the same order.
                Several passes may run before the calls. Several calls may use one pass until its
                graph is freed; the first of them updates the centers.
            target: class indices or class probabilities.
            features: the features of each sample, `(N, d, *)` or `(*, d)` as the head takes them.
                None takes those that were noted for the logits.

        Returns:
            The loss under `reduction`.
        """
        if torch.compiler.is_dynamo_compiling() and not compiler_moves_buffers():
            forward = SoftmaxSeparateLoss.forward  # not that of a subclass, which calls this one
            loss: Tensor = run_uncompiled(forward, self, logits, target, features=features)
            return loss
        _checks.check_nonnegative("separate_weight", self.separate_weight)
        _checks.check_vectors("logits", logits)
        separate: nn.Module = self.separate
        noted, changed_by, learning = None, None, torch.is_grad_enabled()
        if features is None:
            noted, dim, changed_by = _features.find(logits, self.class_dim, self._heads)
            features, sizes = noted.features, (self.feature_dim, self.num_classes)
            _checks.check_vectors("the head's input", features)
            shapes, known = (features.shape, noted.sizes), noted.head.class_dim == self.class_dim
            _checks.check_head_input(*shapes, sizes, self.class_dim, known=known)
            feature_dim = dim_of(self.class_dim, features.shape)
            moving = noted.training and id(self) not in noted.moved
            # Logits that were detached from their graph are for logging.
            learning = learning and noted.recorded and not (noted.requires_grad and logits.is_leaf)
        else:
            _checks.check_vectors("features", features)
            dim = self._dim_of("logits", logits, self.num_classes, target)
            feature_dim = self._dim_of("features", features, self.feature_dim)
            size, samples = self.feature_dim, logits.numel() // self.num_classes
            if (features.shape[feature_dim], features.numel()) != (size, samples * size):
                raise ValueError(
                    f"features must hold {size} values for each of the samples of logits of shape "
                    f"{tuple(logits.shape)}, got shape {tuple(features.shape)}"
                )
            moving = all(getattr(head.module(), "training", True) for head in self._heads)
        _checks.check_logits(logits, target, dim, self.num_classes)
        rows, features = _rows(logits, dim), _rows(features, feature_dim)
        target = _rows(target, dim) if target.is_floating_point() else target.flatten()
        softmax = _softmax_loss(rows, target, separate)
        if learning and not torch.compiler.is_compiling():
            frozen = logits.requires_grad and not features.requires_grad
            self._warn(noted, changed_by, frozen=frozen)
        moving = moving and learning and separate.training
        modes = [] if moving else [(module, module.training) for module in separate.modules()]
        try:
            for module, _ in modes:
                module.training = False
            # Last, so that no error leaves moved centers behind.
            with torch.set_grad_enabled(learning):
                loss = separate(features, target)
        finally:
            for module, mode in modes:
                module.training = mode
        if noted is not None and moving:
            noted.moved.add(id(self))
        terms, mean = getattr(separate, "last_terms", None), softmax.detach()
        mean = mean.mean() if mean.ndim else mean
        self.last_terms = SoftmaxSeparateTerms(mean, *terms) if isinstance(terms, Terms) else None
        weight = self.separate_weight
        loss = softmax + (loss if weight == 1 else weight * loss)
        return loss.reshape(logits.select(dim, 0).shape) if loss.ndim else loss

    def _dim_of(self, name: str, of: Tensor, size: int, target: Tensor | None = None) -> int:
        """The dimension of classes or features where the features were given."""
        dims = [dim for dim in _checks.dims_of(of.shape) if of.shape[dim] == size]
        if target is not None and not target.is_floating_point():
            dims = [dim for dim in dims if of.select(dim, 0).shape == target.shape]
        if len(dims) > 1 and not self._class_dim_given:
            raise ValueError(
                f"{name} of shape {tuple(of.shape)} fit with the classes in dimension 1 and in "
                "the last; pass class_dim to SoftmaxSeparateLoss"
            )
        dim = dim_of(self.class_dim, of.shape)
        return dim if dim in dims or not dims else dims[0]

    def _warn(self, noted: Any, changed_by: str | None, *, frozen: bool) -> None:
        """Warns in training of what may be a mistake, once of each."""
        texts, training = [], self.separate.training
        moves = training and getattr(self.separate, "center_update", "none") == "forward"
        if moves and noted is not None and not noted.training:
            texts.append(
                "the head ran in evaluation mode with gradients on, so the centers do not move; "
                "to validate, use torch.no_grad() and criterion.eval(); to train a model in "
                "evaluation mode, call head.train(), which has no effect on a linear layer"
            )
        if frozen:
            texts.append(
                "the features require no gradient, so the separate loss only updates centers: "
                "ignore this if all layers before the head are frozen; if the head is the whole "
                "model, pass its last layer as head"
            )
        if training and changed_by is not None:
            module = type(noted.head.module()).__name__
            texts.append(
                f"operator {changed_by!r} changed the output of the watched {module}: without a "
                "graph, as in validation under torch.no_grad(), such logits are refused; watch the "
                f"module that returns them, such as torch.nn.Sequential({module}(...), ...), or "
                "pass features there"
            )
        for text in texts:
            if text not in self._warned:
                self._warned.add(text)
                warnings.warn(text, stacklevel=5)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for watched in self._heads:
            _watch.join(watched, self)

    def extra_repr(self) -> str:
        """The settings, for `repr`."""
        return (
            f"separate_weight={self.separate_weight}, class_dim={self.class_dim}, "
            f"watching={bool(self._heads)}"
        )


def _rows(tensor: Tensor, dim: int) -> Tensor:
    """A tensor with `dim` last and the others in one."""
    if dim != tensor.ndim - 1:
        tensor = tensor.movedim(dim, -1)
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])


def _size(layer: nn.Module, side: str) -> int | None:
    sizes = (getattr(layer, f"{side}_{kind}", None) for kind in ("features", "channels"))
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


def _size_of(name: str, given: int | None, layers: list[nn.Module], separate: object) -> int:
    """The argument, else the size of a ready loss, else that of the head's layers."""
    place, side = (-1, "out") if name == "num_classes" else (0, "in")
    found = _size(layers[place], side) if layers else None
    if side == "out" and found == 1:
        _checks.check_int(name, found, least=2)
    sizes = {name: given, f"separate.{name}": getattr(separate, name, None), "the head": found}
    for source, size in sizes.items():
        # With several layers, the argument may name another one.
        if None not in (size, found) and size != found and len(layers) == 1:
            raise ValueError(f"{source} must be {found}, as in the head, or None, got {size}")
    size = next((size for size in sizes.values() if size is not None), None)
    if size is None:
        raise ValueError(
            f"{name} must be given, as no layer of the head defines it; a lazy layer defines it "
            "after its first batch"
        )
    return size


def _softmax_loss(logits: Tensor, target: Tensor, separate: nn.Module) -> Tensor:
    """Softmax loss of logits `(N, C)`, in float32 or wider."""
    logits, soft = logits.to(compute_dtype(logits)), target.is_floating_point()
    weight = getattr(separate, "weight", None)
    ignore_index = getattr(separate, "ignore_index", -100)
    try:
        return nn.functional.cross_entropy(
            logits,
            target.to(logits.dtype) if soft else target.long(),
            None if weight is None else weight.to(logits.dtype),
            ignore_index=-100 if soft else ignore_index,
            reduction=getattr(separate, "reduction", "mean"),
            label_smoothing=getattr(separate, "label_smoothing", 0.0),
        )
    except IndexError:  # Labels out of range, for which this has a clearer error.
        mask_ignored(target, logits.shape[-1], ignore_index)
        raise
