"""The input of a head, found again from its output.

A forward hook notes the input where it lives as long as it can be used: on the autograd node of the
output; without a graph on the output's memory; in compiled code on the output itself.
"""

import threading
import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from separate_loss._checks import dim_of, dims_of
from separate_loss._torch import (
    backward_keeps_graph,
    hooks_of,
    is_exporting,
    is_replica,
    memory_of,
    not_compiled,
    notes_of,
    show_hooks,
    sizes_of,
    version_of,
)

NAME = "_separate_loss"
# Without a graph: how many outputs that exist have their features kept, and how many outputs are
# kept with them to recognise a cast.
MAX_FEATURES, MAX_VALUES = 8, 2

CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
# Files of torch.nn.modules whose layers keep samples and features in their places.
IN_PLACE = ("activation", "batchnorm", "dropout", "instancenorm", "normalization")
# Operators that keep samples in order, by the names of their autograd nodes: Add for AddBackward0.
# fmt: off
VALUES = {
    "Add", "Clamp", "ClampMax", "ClampMin", "Div", "LogSigmoid", "LogSoftmax", "MaskedFill", "Mul",
    "NanToNum", "NativeDropout", "Neg", "Relu", "Rsub", "Sigmoid", "Softmax", "Softplus", "Sub",
    "Tanh", "FakeQuantizePerChannelAffineCachemask", "FakeQuantizePerTensorAffineCachemask",
    "FusedMovingAvgObsFqHelper",
}
REORDERING = {"Permute", "T", "Transpose"}
VIEWS = REORDERING | {"Alias", "Expand", "ReshapeAlias", "Squeeze", "Unsqueeze", "View"}
IN_ORDER = VALUES | VIEWS | {"Clone", "ToCopy", "UnsafeView"}
SELECTING = {"Index", "IndexSelect", "MaskedSelect", "Select", "Slice", "Split", "Unbind"}
# fmt: on
# Of DistributedDataParallel and backward hooks: each output is the input of the same number.
PASSING = {"_DDPSinkBackward", "BackwardHookFunctionBackward"}


class Head:
    """What the hooks and the losses of a module share; what is copied together shares another."""

    def __init__(self, class_dim: int | None = None) -> None:
        self.class_dim = class_dim  # where the module's type shows it
        self.losses: set[int] = set()  # by their ids
        self.active = False  # whether a loss watches
        self.module: weakref.ref[nn.Module] | None = None  # unknown in a copy until it runs
        self.seen = self.parallel = False  # whether a pass was noted, and one of DataParallel
        self.inputs: dict[int, tuple[Tensor, Any]] = {}  # of the passes that run, by thread
        self.recent: deque[weakref.ref[ForwardPass]] = deque()  # without a graph
        self.latest: deque[ForwardPass | None] = deque(maxlen=MAX_VALUES)  # None: with a graph
        # The latest compiled outputs until a loss is called. Writing makes no guards.
        self.compiled: tuple[Tensor, ForwardPass] | None = None
        self.compiled_before: tuple[Tensor, ForwardPass] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Head, (self.class_dim,)


class ForwardPass:
    """A forward pass of a watched module."""

    def __init__(
        self, head: Head, features: Any, version: int | None, output: Tensor, training: bool
    ) -> None:
        self.head = head
        self.features = features
        self.version = version  # of the features; -1 if they may have changed
        self.training = training  # the module's mode
        self.recorded = torch.is_grad_enabled()
        self.moved: set[int] = set()  # losses whose centers this pass has moved
        self.requires_grad = output.requires_grad
        self.sizes = output.shape
        self.layout: tuple[Any, ...] = ()  # of the output
        self.output: weakref.ref[Tensor] | None = None
        self.output_version: int | None = None
        self.values: Tensor | None = None  # of an output whose changes no version or graph shows

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()  # Saved logits hold no features.


class Refused(Exception):  # noqa: N818
    """The reason why logits are refused, and the autograd node that caused it."""


def watch(module: nn.Module, loss: nn.Module) -> Head:
    """Notes the inputs of a module from now on."""
    head = next(iter(heads_of(module)), None)
    if head is None:
        head = Head(_class_dim_of(module))
        if not _is_layer(module):
            module.register_forward_pre_hook(partial(keep, head), with_kwargs=True)
        module.register_forward_hook(partial(record, head), with_kwargs=True)
        show_hooks(module, True)
    head.module = weakref.ref(module)
    join(head, loss)
    return head


def join(head: Head, loss: nn.Module) -> None:
    """Lets a loss watch until it leaves or is deleted."""
    head.active = True
    head.losses.add(id(loss))
    weakref.finalize(loss, leave, head, id(loss)).atexit = False


def leave(head: Head, loss: int, module: nn.Module | None = None) -> None:
    """Removes the hooks, and what they keep, if no other loss watches."""
    head.losses.discard(loss)
    if head.losses:
        return
    module = module or (head.module and head.module())
    for hooks in hooks_of(module) if module else ():
        for key in [key for key, hook in hooks.items() if _head_of(hook) is head]:
            del hooks[key]
    if module:
        show_hooks(module, False)
    vars(head).update(vars(Head(head.class_dim)))


def heads_of(module: nn.Module) -> list[Head]:
    """The heads that hooks of a module name; in a copied module, no loss may know them."""
    found = [_head_of(hook) for hooks in hooks_of(module) for hook in hooks.values()]
    return [head for head in dict.fromkeys(found) if head is not None]


def _head_of(hook: Any) -> Head | None:
    return hook.args[0] if getattr(hook, "func", None) in (keep, record) else None


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is a linear layer or convolution, which changes no input in place."""
    layers = (nn.Linear, *CONVOLUTIONS)
    return any(isinstance(module, t) and type(module).forward is t.forward for t in layers)


def _class_dim_of(module: nn.Module) -> int | None:
    """The class dimension of layers and of plain sequences that end in one; else None."""
    if _is_layer(module):
        return 1 if isinstance(module, CONVOLUTIONS) else -1
    dims = set()
    for layer in module if type(module) is nn.Sequential else ():
        package, _, file = type(layer).__module__.rpartition(".")
        if not (type(layer) is nn.Identity or (package == "torch.nn.modules" and file in IN_PLACE)):
            dims.add(_class_dim_of(layer))
    return dims.pop() if len(dims) == 1 else None


def keep(head: Head, module: nn.Module, inputs: tuple[Any, ...], *named: dict[str, Any]) -> None:
    """The hook before a module that may change its input in place: keeps its version or a copy."""
    given = _first(inputs, *named)
    if head.active and isinstance(given, Tensor) and not is_exporting():
        kept: Any = None if torch.compiler.is_compiling() else version_of(given)
        if kept is None or any(getattr(layer, "inplace", False) for layer in module.modules()):
            kept = given.clone()
        head.inputs[_thread()] = given, kept


def record(head: Head, module: nn.Module, inputs: tuple[Any, ...], *others: Any) -> None:
    """The hook after a module; quantization calls it without keyword arguments."""
    if not head.active or is_exporting():
        return
    given, compiling = _first(inputs, *others[:-1]), torch.compiler.is_compiling()
    features, version = _as_given(head, module, given)
    if not compiling:
        head.module, head.parallel = weakref.ref(module), head.parallel or is_replica(module)
    for output in _tensors(others[-1]):
        if output is given or not output.is_floating_point():
            continue
        noted = ForwardPass(head, features, version, output, module.training)
        if not compiling:
            noted.output_version = version_of(output)
            _note(noted, output)
            continue
        if output.is_cpu or not noted.recorded:  # Compiled code hides versions.
            noted.values = output.detach().clone()
        setattr(output, NAME, noted)
        head.compiled_before = head.compiled
        head.compiled = output, noted


def _as_given(head: Head, module: nn.Module, given: Any) -> tuple[Any, int | None]:
    """The features as they were before the module ran, and their version."""
    compiling = torch.compiler.is_compiling()
    version = None if compiling else version_of(given)
    if not _is_layer(module):
        before, kept = head.inputs.pop(_thread(), (None, None))
        if before is not given and (compiling or memory_of(before) is not memory_of(given)):
            # Another hook exchanged the input. If that has version 0, it did not change.
            return given, -1 if version is None else 0
        return (kept, version_of(kept)) if isinstance(kept, Tensor) else (given, kept)
    return (given.clone() if version is None and isinstance(given, Tensor) else given), version


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _first(inputs: tuple[Any, ...], named: dict[str, Any] | None = None) -> Any:
    return next(iter((*inputs, *(named or {}).values())), None)


def _tensors(output: Any) -> list[Tensor]:
    """The tensors in an output, also in dictionaries, sequences and dataclasses."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = output.values()
    elif is_dataclass(output):
        output = [getattr(output, field.name) for field in fields(output)]
    elif not isinstance(output, (list, tuple)):
        return []
    return [tensor for part in output for tensor in _tensors(part)]


def _note(noted: ForwardPass, output: Tensor) -> None:
    """Notes a pass where logits that come from its output lead to it."""
    head, node, memory, reference = (
        noted.head,
        output.grad_fn,
        memory_of(output),
        weakref.ref(noted),
    )
    head.seen, noted.output, noted.layout = True, weakref.ref(output), _layout(output)

    def after_backward(*_: object) -> None:
        noted = reference()
        if noted is not None and not backward_keeps_graph():
            noted.features = None

    if node is not None:
        notes_of(node)[NAME, output.output_nr] = noted
        node.register_hook(after_backward)
        head.latest.append(None)
    if memory is not None:
        # A node owns its pass; memory does without a graph, unless it is that of the features.
        owned = node is None and memory is not memory_of(noted.features)
        memory[NAME, output.storage_offset()] = (lambda: noted) if owned else reference
    if node is None and memory is not None:
        # Copied once more, as the next CUDA graph takes the memory of compiled values.
        noted.values = (output.detach() if noted.values is None else noted.values).clone()
        head.latest.append(noted)
        head.recent.append(reference)
        if len(head.recent) > MAX_FEATURES and (oldest := head.recent.popleft()()):
            oldest.features = None


def find(logits: Tensor, class_dim: int, heads: list[Head]) -> tuple[ForwardPass, int, str | None]:
    """The pass that logits come from, their class dimension, and what changed their values.

    `class_dim`, 1 or -1, is that of the head. Raises RuntimeError unless logits hold the output of
    one pass of one of the heads, with the samples in the same order.
    """
    if torch.compiler.is_compiling():
        noted = getattr(logits, NAME, None)
        if noted is not None and any(noted.head is head for head in heads):
            noted.head.compiled = noted.head.compiled_before = None
            _check_features(noted)
            return noted, dim_of(class_dim, logits.shape), None
    return _find(logits, class_dim, heads)


@not_compiled
def _find(logits: Tensor, class_dim: int, heads: list[Head]) -> tuple[ForwardPass, int, str | None]:
    if not heads:
        raise RuntimeError("no head is watched; call watch(head) first")
    compiled = [pair for head in heads for pair in (head.compiled_before, head.compiled) if pair]
    compiled += [(one, vars(one)[NAME]) for one in (logits, logits._base) if hasattr(one, NAME)]
    for output, noted in compiled:
        if noted.output is None:
            with suppress(RuntimeError):  # The next CUDA graph may have taken the memory.
                _note(noted, output)
    for head in heads:
        head.compiled = head.compiled_before = None
    try:
        if logits.grad_fn is None:
            noted, dim, changed_by = _without_graph(logits, class_dim, heads)
        else:
            noted, dim, changed_by = _by_graph(logits, class_dim)
        if not any(noted.head is head for head in heads):
            raise Refused("logits are of another head, which this loss does not watch")
        if dim not in (1, logits.ndim - 1):
            raise Refused(f"logits have the classes in dimension {dim}, not in 1 or the last")
        if noted.features is None and noted.recorded:
            raise Refused("backward has freed the graph of the pass; call the loss before")
        if noted.features is None:
            raise Refused(f"without a graph, the features of {MAX_FEATURES} outputs are kept")
    except Refused as refusal:
        raise RuntimeError(_explained(*refusal.args, heads=heads)) from None
    _check_features(noted)
    return noted, dim, changed_by


def _check_features(noted: ForwardPass) -> None:
    known = noted.version is None or torch.compiler.is_compiling()
    if noted.version == -1 or (not known and noted.version != version_of(noted.features)):
        raise RuntimeError(
            "the head's input was changed in place, by the head or after it; use operators that "
            "are not in place, such as torch.nn.ReLU(inplace=False), or watch the layer inside of "
            "the head"
        )


def _by_graph(logits: Tensor, class_dim: int) -> tuple[ForwardPass, int, str | None]:
    node, number, operators = _walk(logits)
    kinds = {_kind(operator) for operator, _ in operators}
    changed_by = next((_name(one) for one, _ in operators if _kind(one) in VALUES), None)
    passes = {key[1]: noted for key, noted in notes_of(node).items() if key[0] == NAME}
    if number not in passes:  # Compiled code returned something else too, such as a cast.
        noted, dim, _ = _by_values(logits, class_dim, [*passes.values()])
        return noted, dim, changed_by
    noted = passes[number]
    dim = _dim_after(operators, noted.sizes, dim_of(class_dim, noted.sizes))
    output = noted.output and noted.output()
    if kinds <= VIEWS:
        _check_output(noted, logits, dim, class_dim)
    elif output is not None and output.grad_fn is node:
        _check_output(noted, output, dim_of(class_dim, noted.sizes), class_dim)
    return noted, dim, changed_by


def _walk(logits: Tensor) -> tuple[Any, int, list[tuple[Any, int]]]:
    """The node and number of an output, and the operators after it, visiting each node once."""
    steps: list[tuple[Any, int]] = [(logits.grad_fn, logits.output_nr)]
    used_by: dict[tuple[Any, int], list[tuple[Any, int]]] = {steps[0]: []}
    found = []
    for step in steps:
        node, number = step
        if any(key[0] == NAME for key in notes_of(node)):
            found.append(step)
            continue
        inputs = node.next_functions
        for branch in [inputs[number]] if node.name() in PASSING else inputs:
            if branch not in used_by and branch[0] is not None:
                steps.append(branch)
            used_by.setdefault(branch, []).append(step)
    if not found:
        unrecorded = _in_memory(logits)
        if unrecorded is None or unrecorded.recorded:
            raise Refused("no forward pass of the watched head has led to logits")
        raise RuntimeError(
            "the watched head ran without recording gradients, so its features would get no "
            "gradient; run the model with gradients on, and use_reentrant=False in "
            "torch.utils.checkpoint"
        )
    leading = dict.fromkeys(found)
    ahead = [*found]
    for step in ahead:
        ahead += [user for user in dict.fromkeys(used_by[step]) if user not in leading]
        leading.update(dict.fromkeys(used_by[step]))
    for step in steps:
        if step in leading and step not in found and step[0].name() not in PASSING:
            _check_order(step[0], _kind(step[0]) in IN_ORDER)
    operators, step = [], found[0]
    while step != steps[0]:
        step, *others = dict.fromkeys(used_by[step])
        if others or len(found) > 1:
            raise Refused(f"operator {_name(step[0])!r} joins several passes, or one with itself")
        operators.append(step)
    return *found[0], [step for step in operators if step[0].name() not in PASSING]


def _check_order(node: Any, kept: bool) -> None:
    if not kept:
        reason = f"operator {_name(node)!r} stands between the head's output and logits"
        raise Refused(reason, node)


def _dim_after(operators: list[tuple[Any, int]], sizes: tuple[int, ...], dim: int) -> int:
    """The class dimension after operators that keep the samples in order."""
    for node, number in operators:
        after, samples = sizes_of(node, number), prod(sizes[:dim])
        if _kind(node) in REORDERING:
            # Its backward pass puts a tensor whose strides are numbers of dimensions in order.
            marks = torch.empty_strided(after, [*range(len(after))], device="meta")
            order = node(marks).stride()
            others = [order[other] for other, size in enumerate(sizes) if other != dim and size > 1]
            places = [order[dim]] * (others == sorted(others))
        else:
            places = [dim] * (after == sizes) or [
                place
                for place, size in enumerate(after)
                if size == sizes[dim] and prod(after[:place]) == samples
            ]
        _check_order(node, bool(places) and prod(after) == prod(sizes))
        dim, sizes = places[-1], after
    return dim


def _without_graph(
    logits: Tensor, class_dim: int, heads: list[Head]
) -> tuple[ForwardPass, int, str | None]:
    noted = _in_memory(logits)
    if noted is None:
        latest = [noted for head in heads for noted in reversed(head.latest) if noted]
        return _by_values(logits, class_dim, latest)
    for dim in dims_of(logits.shape):
        if _steps(_layout(logits), dim) == _steps(noted.layout, dim_of(class_dim, noted.sizes)):
            _check_output(noted, logits, dim, class_dim)
            return noted, dim, None
    raise Refused("logits are a view of the head's output with samples left out or moved")


def _in_memory(logits: Tensor) -> ForwardPass | None:
    """The pass whose output starts at the memory of logits."""
    found: Any = (memory_of(logits) or {}).get((NAME, logits.storage_offset()))
    return found() if found else None


def _by_values(
    logits: Tensor, class_dim: int, passes: list[ForwardPass]
) -> tuple[ForwardPass, int, str | None]:
    """The pass whose output has the values of logits, perhaps cast to another type."""
    fits = [
        (noted, dim)
        for noted in passes
        for dim in dims_of(logits.shape)
        if noted.values is not None and _has_values(noted, logits, dim, class_dim)
    ]
    if not fits:
        raise Refused(
            "logits without a graph must be a recent output of the head, a view of one, or a cast "
            f"of one of the latest {MAX_VALUES}"
        )
    (noted, dim), *others = fits
    rows = logits.detach().movedim(dim, -1).flatten(0, -2)
    same = len(rows) > 1 and bool((rows == rows[:1]).all())
    if same or any(at != dim or not _equal(one.features, noted.features) for one, at in others):
        raise Refused(
            "logits have the same values for several samples or passes, so that a cast or copy of "
            "the head's output cannot be recognised"
        )
    return noted, dim, None


def _check_output(noted: ForwardPass, tensor: Tensor, dim: int, class_dim: int) -> None:
    """Refuses an output, or a view of it, that was changed in place."""
    same = noted.output_version == version_of(tensor)
    if noted.output_version is None:  # compiled, or in inference mode
        same = noted.values is None or _has_values(noted, tensor, dim, class_dim)
    if not same:
        raise Refused("logits were changed in place after the head had returned them")


def _has_values(noted: ForwardPass, tensor: Tensor, dim: int, class_dim: int) -> bool:
    """Whether a tensor with the classes in dimension `dim` holds the rows of an output."""
    values: Any = noted.values
    return _equal(tensor.movedim(dim, -1), values.movedim(dim_of(class_dim, noted.sizes), -1))


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.device != other.device or one.numel() != other.numel():
        return False
    if one.shape[-1] != other.shape[-1]:
        return False
    other = other.detach().to(one.dtype).reshape(one.shape)
    return torch.allclose(one.detach(), other, rtol=0, atol=0, equal_nan=True)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _steps(layout: tuple[Any, ...], class_dim: int) -> tuple[Any, ...]:
    """Size and stride of the classes, and the fewest sizes and strides of the samples."""
    sizes, strides, dtype = layout
    steps: list[tuple[int, int]] = []
    for dim, (size, stride) in enumerate(zip(sizes, strides, strict=True)):
        if dim == class_dim or size == 1:
            continue
        if steps and steps[-1][1] == size * stride:
            size *= steps.pop()[0]  # noqa: PLW2901
        steps.append((size, stride))
    return dtype, sizes[class_dim], strides[class_dim], steps


def _kind(node: Any) -> str:
    name: str = node.name()
    return name.split("Backward", 1)[0] if name[-1].isdigit() else name


def _name(node: Any) -> str:
    """The Python name of an operator, such as index_select for IndexSelectBackward0."""
    name = node.name().rsplit("::", 1)[-1].split("Backward")[0]
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).strip("_")


def _explained(reason: str, node: Any = None, *, heads: list[Head]) -> str:
    text = (
        f"{reason}; logits must hold the output of one forward pass of the watched head, sample by "
        "sample in the same order"
    )
    if any(head.parallel for head in heads) or (node and node.name() == "GatherBackward"):
        text += (
            "\nThe model runs in torch.nn.DataParallel, whose replicas each see a part of the "
            "batch; use torch.nn.parallel.DistributedDataParallel."
        )
    elif not any(head.seen for head in heads):
        text += (
            "\nThe watched head has had no forward pass. Call watch(head) with the head that runs; "
            "a copied or unpickled loss needs that, unless its head was copied with it."
        )
    if node is not None and _kind(node) in SELECTING:
        text += "\nTo leave samples out, keep all logits and set their labels to ignore_index."
    return text + (
        "\nIf you have the features of each sample, pass them:\n"
        "    features = ...  # the input of the head, in the order of the logits\n"
        "    loss = criterion(logits, target, features=features)"
    )
