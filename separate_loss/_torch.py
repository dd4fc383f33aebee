"""Functions that need private names of PyTorch, or names that older releases do not have.

Each docstring says what the function returns if a release lacks the name. No other module of the
package uses a private name of torch.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])

Function = TypeVar("Function", bound=Callable[..., Any])


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is on; True if it is unknown."""
    return bool(getattr(forward_ad, "_current_level", 0) >= 0)


def in_transform() -> bool:
    """Whether a transform of torch.func or forward mode is on; True if it is unknown."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is None or active() or in_forward_mode()


def in_compiled_transform() -> bool:
    """Whether the compiler traces a transform of torch.func; False before 2.11, which differ."""
    if RELEASE < (2, 11):
        return False
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is not None and bool(active())


def in_autocast(device: str) -> bool:
    """Whether autocast is on for a device type."""
    if torch.compiler.is_compiling():
        # The compiler of 2.6 does not trace `is_autocast_available`.
        return device in {"cpu", "cuda", "xpu", "mps"} and torch.is_autocast_enabled(device)
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def unwrapped(tensor: Tensor) -> Tensor | None:
    """A tensor without the wrappers of torch.func; None if vmap batches it.

    Compiled code gets None in each transform. If it is unknown, None for subclasses.
    """
    if torch.compiler.is_compiling():
        return None if in_compiled_transform() else tensor
    functorch = getattr(torch._C, "_functorch", None)
    if functorch is None:
        return tensor if type(tensor) in (Tensor, nn.Parameter) else None
    if functorch.is_legacy_batchedtensor(tensor):  # is_grads_batched=True
        return None
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return None
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def under_vmap(tensor: Tensor) -> bool:
    """Whether vmap batches a tensor; if it is unknown, whether it is a subclass."""
    return unwrapped(tensor) is None


def assert_on_device(condition: Tensor, message: str) -> None:
    """Asserts on the device, without a synchronisation; does nothing if a release cannot."""
    check = getattr(torch, "_assert_async", None)
    if check is not None:
        check(condition, message)


def not_compiled(function: Function) -> Function:
    """Runs a function in Python in compiled code, as torch.compiler.disable does.

    torch.compiler.disable would import the whole compiler. If a release ignores the mark, the
    compiler traces the function and breaks the graph in it.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


@not_compiled
def run_uncompiled(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Runs a function, and what it calls, in Python in compiled code, whose graph breaks."""
    # The mark alone would leave what the function calls to the compiler.
    return torch.compiler.disable(function)(*arguments, **named)


def compiler_moves_buffers(*, by_probabilities: bool = False) -> bool:
    """Whether compiled code updates a buffer once; before 2.8 the backward pass repeats it.

    Inductor of 2.8 to 2.10 moves centers wrongly by class probabilities.
    """
    return ((2, 11) if by_probabilities else (2, 8)) <= RELEASE


def is_exporting() -> bool:
    """Whether torch.export traces; False before 2.7, which cannot tell it from compiling.

    The compiler of 2.7 to 2.11 takes the public function for True.
    """
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def backward_keeps_graph() -> bool:
    """Whether the backward pass of this thread keeps its graph; True if it is unknown."""
    private = getattr(torch._C, "_autograd", None)
    keeps = getattr(private, "_get_current_graph_task_keep_graph", None)
    return keeps is None or bool(keeps())


def notes_of(node: Any) -> dict[Any, Any]:
    """A dictionary that lives with an autograd node; a temporary one if it has none."""
    notes: dict[Any, Any] = getattr(node, "metadata", {})
    return notes


def sizes_of(node: Any, number: int) -> tuple[int, ...]:
    """The sizes of an output of an autograd node; () if they are unknown."""
    known = getattr(node, "_input_metadata", ())
    return tuple(known[number].shape) if number < len(known) else ()


def version_of(value: Any) -> int | None:
    """How often a tensor was changed in place; None if it is unknown, and in compiled code."""
    if torch.compiler.is_compiling() or not isinstance(value, Tensor) or value.is_inference():
        return None
    return getattr(value, "_version", None)


def memory_of(tensor: Any) -> Any:
    """A dictionary that lives with a tensor's memory, shared by views; None without memory."""
    try:
        return vars(tensor.untyped_storage())
    except (AttributeError, NotImplementedError, RuntimeError):  # such as wrappers of torch.func
        return None


def hooks_of(module: nn.Module | None) -> list[dict[int, Any]]:
    """The dictionaries of a module's forward hooks; empty if a release has other names."""
    names = "_forward_pre_hooks", "_forward_hooks"
    return [hooks for name in names if (hooks := getattr(module, name, None)) is not None]


def show_hooks(module: nn.Module | None, shown: bool) -> None:
    """Lets the compiler see that hooks came or went: it guards on these types, not on hooks."""
    for name in ("_parameters", "_modules"):
        old, new = (dict, OrderedDict) if shown else (OrderedDict, dict)
        if type(getattr(module, name, None)) is old:
            vars(module)[name] = new(vars(module)[name])
