"""The input of a head, found again from its output.

A forward hook notes the input where it lives as long as it can be used: on the autograd node of the
output; without a graph on the output's memory; in compiled code, until a loss is called, in `Head`.
"""

import threading
import weakref
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from itertools import count
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from separate_loss import _torch
from separate_loss._checks import dim_of, dims_of

NAME, COUNT = "_separate_loss", count()
# Without a graph, how many outputs keep their features, and how many are kept to recognise a cast;
# how many of compiled code are kept until a loss is called.
MAX_FEATURES, MAX_VALUES, MAX_COMPILED = 8, 2, 4
CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
LAYERS = (nn.Linear, *CONVOLUTIONS)
# Files of torch.nn.modules whose layers leave samples and features where they are.
PLAIN = {"activation", "batchnorm", "dropout", "instancenorm", "normalization"}
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

NO_PASS = (
    "no forward pass of the watched head has led to logits; call watch(head) with the head that "
    "runs (a copied or unpickled loss needs that, unless its head was copied with it)"
)
Step = tuple[Any, int]  # a node of autograd's graph, and the number of its output


class Head:
    """What the hooks and the losses of a module share; what is copied together shares another."""

    def __init__(self, class_dim: int | None, is_layer: bool) -> None:
        self.class_dim = class_dim  # of a module whose type shows it
        self.is_layer = is_layer  # which changes no input in place
        self.name = f"{NAME}_{next(COUNT)}"  # of its notes
        self.losses: set[int] = set()  # that watch, by their ids
        self.active = False  # whether a loss watches
        self.module: weakref.ref[nn.Module] | None = None  # unknown in a copy until it runs
        self.inputs: dict[int, tuple[Any, Any]] = {}  # of passes that run, by thread
        self.recent: deque[weakref.ref[ForwardPass]] = deque()  # without a graph
        self.latest: deque[ForwardPass | None] = deque(maxlen=MAX_VALUES)  # None: with a graph
        self.compiled: tuple[tuple[Tensor, ForwardPass], ...] = ()  # until a loss is called

    def __reduce__(self) -> tuple[Any, ...]:
        return Head, (self.class_dim, self.is_layer)


class ForwardPass:
    """A forward pass of a watched module."""

    training = False  # the module's mode
    output: weakref.ref[Tensor] | None = None
    output_version: int | None = None
    values: Tensor | None = None  # of an output whose changes no version shows

    def __init__(self, head: Head, features: Any, version: int | None, output: Tensor) -> None:
        self.head, self.features = head, features
        self.version = version  # of the features; -1 if they may have changed
        self.recorded, self.requires_grad = torch.is_grad_enabled(), output.requires_grad
        self.moved: set[int] = set()  # losses whose centers this pass has moved
        self.sizes = output.shape

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # Saved logits hold no features.


Found = tuple[ForwardPass, int, str | None]


def watch(module: nn.Module, loss: nn.Module) -> Head:
    """Notes the inputs of a module from now on."""
    head = next(iter(heads_of(module)), None)
    if head is None:
        head = Head(_class_dim_of(module), _is_layer(module))
        if not head.is_layer:
            module.register_forward_pre_hook(partial(keep, head), with_kwargs=True)
        module.register_forward_hook(partial(record, head), with_kwargs=True)
        _torch.show_hooks(module, True)
    head.module = weakref.ref(module)
    join(head, loss)
    return head


def join(head: Head, loss: nn.Module) -> None:
    """Lets a loss watch until it leaves or is deleted."""
    head.losses.add(id(loss))
    head.active = True
    weakref.finalize(loss, leave, head, id(loss)).atexit = False


def leave(head: Head, loss: int, module: nn.Module | None = None) -> None:
    """Removes the hooks, and what they keep, if no other loss watches."""
    head.losses.discard(loss)
    module = module or (head.module() if head.module else None)
    if head.losses:
        return
    for hooks in _torch.hooks_of(module):
        for key in [key for key, hook in hooks.items() if _head_of(hook) is head]:
            del hooks[key]
    _torch.show_hooks(module, False)
    vars(head).update(vars(Head(head.class_dim, head.is_layer)))


def heads_of(module: nn.Module) -> list[Head]:
    """The heads in the hooks of a module; of those in a copied module no loss may know."""
    found = [_head_of(hook) for hooks in _torch.hooks_of(module) for hook in hooks.values()]
    return [head for head in dict.fromkeys(found) if head is not None]


def _head_of(hook: Any) -> Head | None:
    return hook.args[0] if getattr(hook, "func", None) in (keep, record) else None


def _is_layer(module: nn.Module) -> bool:
    return any(isinstance(module, t) and type(module).forward is t.forward for t in LAYERS)


def _class_dim_of(module: nn.Module) -> int | None:
    """The class dimension of layers, and of sequences of them and plain modules; else None."""
    if _is_layer(module):
        return 1 if isinstance(module, CONVOLUTIONS) else -1
    dims = set()
    for layer in module if type(module) is nn.Sequential else ():
        package, _, file = type(layer).__module__.rpartition(".")
        plain = package == "torch.nn.modules" and file in PLAIN
        dims.update([] if plain or type(layer) is nn.Identity else [_class_dim_of(layer)])
    return dims.pop() if len(dims) == 1 else None


def keep(head: Head, module: nn.Module, inputs: tuple[Any, ...], *named: dict[str, Any]) -> None:
    """The hook before a module that may change its input in place: keeps its version or a copy."""
    given = _first(inputs, *named)
    if head.active and isinstance(given, Tensor) and not _torch.is_exporting():
        kept: Any = _version_of(given)
        if kept is None or any(getattr(layer, "inplace", False) for layer in module.modules()):
            kept = given.clone()
        head.inputs[_thread()] = given, kept


def record(head: Head, module: nn.Module, inputs: tuple[Any, ...], *others: Any) -> None:
    """The hook after a module; quantization calls it without keyword arguments."""
    if not head.active or _torch.is_exporting():
        return
    given, compiling = _first(inputs, *others[:-1]), torch.compiler.is_compiling()
    features, version = given, _version_of(given)
    if not head.is_layer:
        before, kept = head.inputs.pop(_thread(), (None, None))
        if not _same_memory(before, given):
            # Another hook exchanged the input. With version 0 it did not change since.
            version = -1 if version is None else 0
        elif isinstance(kept, Tensor):
            features, version = kept, _version_of(kept)
        else:
            version = kept
    elif version is None and isinstance(given, Tensor):
        features = given.clone()
    for output in _tensors(others[-1]):
        if output is given or not output.is_floating_point():
            continue
        noted = ForwardPass(head, features, version, output)
        noted.training = module.training
        if not compiling:
            head.module, noted.output_version = weakref.ref(module), _version_of(output)
            _note(noted, output)
            continue
        if output.is_cpu or not noted.recorded:  # Elsewhere the comparison would wait.
            noted.values = output.detach().clone()
        head.compiled = (*head.compiled[1 - MAX_COMPILED :], (output, noted))


def _version_of(value: Any) -> int | None:
    """The number of changes in place; None in compiled code and in inference mode."""
    return None if torch.compiler.is_compiling() else _torch.version_of(value)


def _same_memory(one: Any, other: Any) -> bool:
    if one is other or torch.compiler.is_compiling():
        return one is other
    memory = _torch.memory_of(one)
    return memory is not None and memory is _torch.memory_of(other)


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _first(inputs: tuple[Any, ...], named: dict[str, Any] | None = None) -> Any:
    return inputs[0] if inputs else next(iter((named or {}).values()), None)


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
    head, node, reference = noted.head, output.grad_fn, weakref.ref(noted)
    noted.output, memory = weakref.ref(output), _torch.memory_of(output)

    def after_backward(*_: object) -> None:
        if not _torch.backward_keeps_graph() and (noted := reference()):
            noted.features = None

    if node is not None:
        _torch.notes_of(node)[head.name, output.output_nr] = noted
        node.register_hook(after_backward)
        head.latest.append(None)
    elif memory is not None:
        # Copied again: the next CUDA graph takes the memory of compiled values.
        noted.values = (output.detach() if noted.values is None else noted.values).clone()
        head.latest.append(noted)
        head.recent.append(reference)
        if len(head.recent) > MAX_FEATURES and (oldest := head.recent.popleft()()):
            oldest.features = None
    if memory is not None:
        # Without a graph the memory owns the pass, but not one whose features it holds.
        owned = node is None and not _same_memory(noted.features, output)
        way = (lambda: noted) if owned else reference
        memory[head.name, output.storage_offset()] = way, _layout(output)


def find(logits: Tensor, class_dim: int, heads: list[Head]) -> Found:
    """The pass that logits come from, their class dimension, and what changed their values.

    `class_dim`, 1 or -1, is that of the head. Raises RuntimeError unless logits hold the output of
    one pass of one of the heads, with the samples in the same order.
    """
    if not torch.compiler.is_compiling():
        for head in heads:  # the usual case, in short
            noted = _torch.notes_of(logits.grad_fn).get((head.name, logits.output_nr))
            if noted is not None and noted.output_version == _torch.version_of(logits):
                return _checked(noted), dim_of(class_dim, logits.shape), None
        return _find(logits, class_dim, heads)
    for head in heads:
        for number, (output, noted) in enumerate(head.compiled):
            if output is logits:
                # Tensors that are kept would become outputs of the compiled function.
                head.compiled = head.compiled[:number] + head.compiled[number + 1 :]
                return _checked(noted), dim_of(class_dim, logits.shape), None
    found: Found = _torch.run_uncompiled(_find, logits, class_dim, heads)
    return found


def _find(logits: Tensor, class_dim: int, heads: list[Head]) -> Found:
    if not heads:
        raise RuntimeError("no head is watched; call watch(head) first")
    for head in heads:
        compiled, head.compiled = head.compiled, ()
        for output, new in compiled:
            with suppress(RuntimeError):  # The next CUDA graph may have taken the memory.
                _note(new, output)
    way = _without_graph if logits.grad_fn is None else _by_graph
    noted, dim, changed_by = way(logits, class_dim, heads)
    if dim not in (1, logits.ndim - 1):
        raise _refused(f"logits have the classes in dimension {dim}, not in 1 or the last")
    return _checked(noted), dim, changed_by


def _checked(noted: ForwardPass) -> ForwardPass:
    """The pass, if its features are there as the head has seen them."""
    if noted.features is None and noted.requires_grad:
        raise RuntimeError("backward has freed the graph of the pass; call the loss before")
    if noted.features is None:
        raise RuntimeError(f"without a graph, the features of {MAX_FEATURES} outputs are kept")
    known = noted.version is not None and not torch.compiler.is_compiling()
    if noted.version == -1 or (known and noted.version != _torch.version_of(noted.features)):
        raise RuntimeError(
            "the head's input was changed in place, by the head or after it; use operators that "
            "are not in place, such as torch.nn.ReLU(inplace=False), or watch the layer inside"
        )
    return noted


def _by_graph(logits: Tensor, class_dim: int, heads: list[Head]) -> Found:
    (node, number), operators = _walk(logits, heads)
    kinds = {_kind(operator) for operator, _ in operators}
    changed_by = next((_name(one) for one, _ in operators if _kind(one) in VALUES), None)
    passes = _passes(node, heads)
    if number not in passes:  # Compiled code returned something else too, such as a cast.
        return *_by_values(logits, class_dim, [*passes.values()])[:2], changed_by
    noted = passes[number]
    place = dim_of(class_dim, noted.sizes)
    dim = _dim_after(operators, noted.sizes, place)
    output = None if noted.output is None else noted.output()
    if kinds <= VIEWS:
        _check_output(noted, logits, dim, class_dim)
    elif output is not None and output.grad_fn is node:
        _check_output(noted, output, place, class_dim)
    return noted, dim, changed_by


def _passes(node: Any, heads: list[Head]) -> dict[int, ForwardPass]:
    """The passes whose outputs a node has computed, by the numbers of the outputs."""
    names = [head.name for head in heads]
    return {key[1]: one for key, one in _torch.notes_of(node).items() if key[0] in names}


def _walk(logits: Tensor, heads: list[Head]) -> tuple[Step, list[Step]]:
    """The node of an output, and the operators from there to the logits; visits each node once."""
    steps: list[Step] = [(logits.grad_fn, logits.output_nr)]
    used_by: dict[Step, dict[Step, None]] = {steps[0]: {}}
    found, notes = [], set[str]()
    for step in steps:
        node, number = step
        if _passes(node, heads):
            found.append(step)
            continue
        notes.update([node.name()], (key[0] for key in _torch.notes_of(node)))
        inputs = node.next_functions
        for branch in inputs[number : number + 1] if node.name() in PASSING else inputs:
            if branch not in used_by and branch[0] is not None:
                steps.append(branch)
            used_by.setdefault(branch, {})[step] = None
    if not found:
        reason = NO_PASS
        if any(note.startswith(NAME) for note in notes):
            reason = NO_PASS.replace("no forward pass of the watched head", "another head")
        elif "CheckpointFunctionBackward" in notes:
            reason += "; a head in torch.utils.checkpoint needs use_reentrant=False"
        raise _refused(reason)
    operators, step = [], found[0]
    while step != steps[0]:
        users = [*used_by[step]]
        if len(users) > 1 or len(found) > 1:
            names = " and ".join(repr(_name(user)) for user, _ in users)
            reason = f"operator {names} joins several passes, or one with itself"
            raise _refused(reason, users[0][0])
        step = users[0]
        if step[0].name() not in PASSING:
            operators.append(step)
    for node, _ in operators:
        if _kind(node) not in IN_ORDER:
            raise _stands_between(node)
    return found[0], operators


def _stands_between(node: Any) -> RuntimeError:
    return _refused(f"operator {_name(node)!r} stands between the head's output and logits", node)


def _dim_after(operators: list[Step], sizes: tuple[int, ...], dim: int) -> int:
    """The class dimension after operators that keep the samples in order."""
    for node, number in operators:
        after, samples = _torch.sizes_of(node, number), prod(sizes[:dim])
        if _kind(node) in REORDERING:
            # Its backward pass puts a tensor back in order, here one with dimensions as strides.
            order = node(torch.empty_strided(after, [*range(len(after))], device="meta")).stride()
            others = [order[other] for other, size in enumerate(sizes) if other != dim and size > 1]
            places = [order[dim]] * (others == sorted(others))
        elif after == sizes:
            places = [dim]
        else:
            places = [at for at in range(len(after)) if prod(after[:at]) == samples]
            places = [at for at in places if after[at] == sizes[dim]]
        if not places or prod(after) != prod(sizes):
            raise _stands_between(node)
        dim, sizes = places[-1], after
    return dim


def _without_graph(logits: Tensor, class_dim: int, heads: list[Head]) -> Found:
    notes, start = _torch.memory_of(logits) or {}, logits.storage_offset()
    here = [notes[head.name, start] for head in heads if (head.name, start) in notes]
    found = [(noted, layout) for reference, layout in here if (noted := reference())]
    passes = [noted for noted, _ in found]
    if found and found[0][1] == _layout(logits):
        place = dim_of(class_dim, passes[0].sizes)
        _check_output(passes[0], logits, place, class_dim)
        return passes[0], place, None
    latest = [noted for head in heads for noted in reversed(head.latest) if noted]
    return _by_values(logits, class_dim, passes or latest)


def _by_values(logits: Tensor, class_dim: int, passes: list[ForwardPass]) -> Found:
    """The pass whose output has the values of logits, perhaps cast to another type."""
    ways = [(one, dim) for one in passes if one.values is not None for dim in dims_of(logits.shape)]
    fits = [way for way in ways if _has_values(way[0], logits, way[1], class_dim)]
    if not fits:
        recent = "logits without a graph must be a recent output of the head, a view of one, or a "
        raise _refused(f"{recent}cast of one of the latest {MAX_VALUES}" if passes else NO_PASS)
    (noted, dim), *others = fits
    rows = logits.detach().movedim(dim, -1).flatten(0, -2)
    same = len(rows) > 1 and bool((rows == rows[:1]).all())
    if same or any(at != dim or not _equal(one.features, noted.features) for one, at in others):
        raise _refused("logits have the same values for several samples, dimensions or passes")
    return noted, dim, None


def _check_output(noted: ForwardPass, tensor: Tensor, dim: int, class_dim: int) -> None:
    """Refuses an output, or a view of it, that was changed in place."""
    same = noted.output_version == _version_of(tensor)
    if noted.output_version is None:  # compiled, or in inference mode
        same = noted.values is None or _has_values(noted, tensor, dim, class_dim)
    if not same:
        raise _refused("logits were changed in place after the head had returned them")


def _has_values(noted: ForwardPass, tensor: Tensor, dim: int, class_dim: int) -> bool:
    """Whether the rows of a tensor with the classes in `dim` are those of an output."""
    values: Any = noted.values
    return _equal(tensor.movedim(dim, -1), values.movedim(dim_of(class_dim, noted.sizes), -1))


def _equal(one: Tensor, other: Tensor) -> bool:
    of_one, of_other = ((of.device, of.numel(), of.shape[-1]) for of in (one, other))
    if of_one != of_other:
        return False
    other = other.detach().to(one.dtype).reshape(one.shape)
    return torch.allclose(one.detach(), other, rtol=0, atol=0, equal_nan=True)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _kind(node: Any) -> str:
    name: str = node.name()
    return name.split("Backward", 1)[0] if name[-1].isdigit() else name


def _name(node: Any) -> str:
    """The Python name of an operator, such as index_select for IndexSelectBackward0."""
    name = node.name().rsplit("::", 1)[-1].split("Backward")[0]
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).strip("_")


def _refused(reason: str, node: Any = None) -> RuntimeError:
    hint = ""
    if node is not None and node.name() == "GatherBackward":
        hint = (
            "The model runs in torch.nn.DataParallel, whose replicas each see a part of the "
            "batch; use torch.nn.parallel.DistributedDataParallel.\n"
        )
    elif node is not None and _kind(node) in SELECTING:
        hint = "To leave samples out, keep all logits and set their labels to ignore_index.\n"
    return RuntimeError(
        f"{reason}; logits must hold the output of one forward pass of the watched head, sample by "
        f"sample in the same order\n{hint}If you have the features of each sample, pass them:\n"
        "    features = ...  # the input of the head, in the order of the logits\n"
        "    loss = criterion(logits, target, features=features)"
    )
