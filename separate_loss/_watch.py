"""Hooks that note the input of a head where `_features` finds it from the output.

A note lives as long as it can be used: on the autograd node of the output; without a graph on the
output's memory; in compiled code, until a loss is called, in `Head`.
"""

import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from separate_loss import _torch

# Without a graph, how many outputs keep their features, and how many are kept to recognise a cast;
# how many of compiled code are kept until a loss is called.
MAX_FEATURES, MAX_VALUES, MAX_COMPILED = 8, 2, 4
Kept = tuple[Any, int | None]  # an input and its version; -1 if it may have changed
CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
CLASS_DIMS: dict[Any, int] = {nn.Linear.forward: -1} | {layer.forward: 1 for layer in CONVOLUTIONS}
# Files of torch.nn.modules whose layers leave samples and features where they are.
PLAIN = {"activation", "batchnorm", "dropout", "instancenorm", "normalization"}


class Head:
    """What the hooks and the losses of a module share; what is copied together shares another."""

    def __init__(self, class_dim: int | None) -> None:
        self.class_dim = class_dim  # of a module whose type shows it
        self.losses: tuple[int, ...] = ()  # that watch, by their ids; the compiler reads no set
        self.module: Callable[[], nn.Module | None] = lambda: None  # in a copy until it runs
        self.inputs: dict[int, tuple[Any, Any]] = {}  # of passes that run, by thread
        self.recent: deque[weakref.ref[ForwardPass]] = deque()  # without a graph
        self.latest: deque[ForwardPass | None] = deque(maxlen=MAX_VALUES)  # None: with a graph
        self.compiled: tuple[tuple[Tensor, ForwardPass], ...] = ()  # until a loss is called

    def __reduce__(self) -> tuple[Any, ...]:
        return Head, (self.class_dim,)


class ForwardPass:
    """A forward pass of a watched module."""

    output: weakref.ref[Tensor]
    layout: tuple[Any, ...]  # of the output
    values: Tensor | None = None  # of an output whose changes no version shows

    def __init__(self, head: Head, kept: Kept, output: Tensor, training: bool) -> None:
        self.head, self.training = head, training
        self.features, self.version = kept
        self.recorded, self.requires_grad = torch.is_grad_enabled(), output.requires_grad
        self.moved: set[int] = set()  # losses whose centers this pass has moved
        self.sizes, self.output_version = output.shape, _torch.version_of(output)


def watch(module: nn.Module, loss: nn.Module) -> Head:
    """Notes the inputs of a module from now on."""
    head = next(iter(heads_of(module)), None)
    if head is None:
        head = Head(_class_dim_of(module))
        if head.class_dim is None or isinstance(module, nn.Sequential):  # else it is a layer
            module.register_forward_pre_hook(partial(keep, head), with_kwargs=True)
        module.register_forward_hook(partial(record, head), with_kwargs=True)
        _torch.show_hooks(module, True)
    head.module = weakref.ref(module)
    join(head, loss)
    return head


def join(head: Head, loss: nn.Module) -> None:
    """Lets a loss watch until it leaves or is deleted."""
    if id(loss) in head.losses:
        return
    head.losses += (id(loss),)
    weakref.finalize(loss, leave, head, id(loss)).atexit = False


def leave(head: Head, loss: int, module: nn.Module | None = None) -> None:
    """Removes the hooks, and what they keep, if no other loss watches."""
    head.losses = tuple(one for one in head.losses if one != loss)
    module = module or head.module()
    if head.losses:
        return
    for hooks in _torch.hooks_of(module):
        for key in [key for key, hook in hooks.items() if _head_of(hook) is head]:
            del hooks[key]
    _torch.show_hooks(module, False)
    vars(head).update(vars(Head(head.class_dim)))


def heads_of(module: nn.Module) -> list[Head]:
    """The heads in the hooks of a module; of those in a copied module no loss may know."""
    found = [_head_of(hook) for hooks in _torch.hooks_of(module) for hook in hooks.values()]
    return [head for head in dict.fromkeys(found) if head is not None]


def _head_of(hook: Any) -> Head | None:
    return hook.args[0] if getattr(hook, "func", None) in (keep, record) else None


def _class_dim_of(module: nn.Module) -> int | None:
    """The class dimension of layers, and of sequences of them and plain modules; else None."""
    if type(module) is not nn.Sequential:
        return CLASS_DIMS.get(getattr(type(module), "forward", None))
    dims = set()
    for part in module:
        package, _, file = type(part).__module__.rpartition(".")
        plain = package == "torch.nn.modules" and file in PLAIN
        dims.update([] if plain or type(part) is nn.Identity else [_class_dim_of(part)])
    return dims.pop() if len(dims) == 1 else None


def keep(head: Head, module: nn.Module, inputs: tuple[Any, ...], *named: dict[str, Any]) -> None:
    """The hook before a module that may change its input in place."""
    if head.losses and not _torch.is_exporting():
        given = _first(inputs, *named)
        in_place = any(getattr(layer, "inplace", False) for layer in module.modules())
        head.inputs[_thread()] = given, _as_it_is(given, in_place)


def record(head: Head, module: nn.Module, inputs: tuple[Any, ...], *others: Any) -> None:
    """The hook after a module; quantization calls it without keyword arguments."""
    if not head.losses or _torch.is_exporting():
        return
    given, compiling = _first(inputs, *others[:-1]), torch.compiler.is_compiling()
    before, kept = head.inputs.pop(_thread(), (given, None)) if head.inputs else (given, None)
    if before is not given:
        memory = None if compiling else _torch.memory_of(before)
        if memory is None or memory is not _torch.memory_of(given):
            # Another hook exchanged the input. With version 0 it did not change since.
            kept = given, -1 if _torch.version_of(given) is None else 0
    kept = kept or _as_it_is(given)
    for output in _tensors(others[-1]):
        if output is given or not output.is_floating_point():
            continue
        noted = ForwardPass(head, kept, output, module.training)
        if not compiling:
            head.module = weakref.ref(module)
            note(noted, output)
            continue
        if output.is_cpu or not noted.recorded:  # Elsewhere the comparison would wait.
            noted.values = output.detach().clone()
        head.compiled = (*head.compiled[1 - MAX_COMPILED :], (output, noted))


def _as_it_is(given: Any, copied: bool = False) -> Kept:
    """An input and its version; a copy if told so, or if no version would show a change."""
    if isinstance(given, Tensor) and (copied or _torch.version_of(given) is None):
        given = given.clone()
    return given, _torch.version_of(given)


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


def note(noted: ForwardPass, output: Tensor) -> None:
    """Notes a pass where logits that come from its output lead to it."""
    head, node, memory = noted.head, output.grad_fn, _torch.memory_of(output)
    reference, noted.output = weakref.ref(noted), weakref.ref(output)

    def after_backward(*_: object) -> None:
        if not _torch.backward_keeps_graph() and (noted := reference()):
            noted.features = None

    if node is not None:
        _torch.notes_of(node)[head, output.output_nr] = noted
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
        noted.layout = output.shape, output.stride(), output.dtype
        # Without a graph the memory owns the pass, but not one whose features it holds.
        owned = node is None and memory is not _torch.memory_of(noted.features)
        memory[head, output.storage_offset()] = (lambda: noted) if owned else reference
