"""Functions that need private names of PyTorch, or names that older releases do not have.

Each docstring says what the function returns if a release lacks the name. No other module of the
package uses a private name of torch.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])

Function = TypeVar("Function", bound=Callable[..., Any])


def _found(owner: Any, path: str) -> Any:
    """An attribute of an attribute, or None."""
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is on; True if it is unknown."""
    return bool(getattr(forward_ad, "_current_level", 0) >= 0)


def in_transform() -> bool:
    """Whether a transform of torch.func or forward mode is on; True if it is unknown."""
    active = _found(torch._C, "_are_functorch_transforms_active")
    return active is None or active() or in_forward_mode()


def in_compiled_transform() -> bool:
    """Whether the compiler traces a transform of torch.func; False before 2.11, which differ."""
    active = _found(torch._C, "_are_functorch_transforms_active") if RELEASE >= (2, 11) else None
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
    functorch = _found(torch._C, "_functorch")
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
    check = _found(torch, "_assert_async")
    if check is not None:
        check(condition, message)


def not_compiled(function: Function) -> Function:
    """Runs a function in Python in compiled code, as torch.compiler.disable does.

    torch.compiler.disable would import the whole compiler. If a release ignores the mark, the
    compiler traces the function and breaks the graph in it.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def compiler_moves_buffers() -> bool:
    """Whether compiled code updates a buffer once; before 2.8 the backward pass repeats it."""
    return RELEASE >= (2, 8)


def is_exporting() -> bool:
    """Whether torch.export traces; False before 2.7, which cannot tell it from compiling."""
    exporting = _found(torch.compiler, "is_exporting")
    return exporting is not None and bool(exporting())


def in_backward() -> bool:
    """Whether this thread runs a backward pass; False if it is unknown."""
    task = _found(torch._C, "_current_graph_task_id")
    return task is not None and task() != -1


def backward_keeps_graph() -> bool:
    """Whether the backward pass of this thread keeps its graph; True if it is unknown."""
    keeps = _found(torch._C, "_autograd._get_current_graph_task_keep_graph")
    return keeps is None or bool(keeps())


def metadata_of(node: Any) -> dict[Any, Any]:
    """The metadata dictionary of an autograd node; a temporary one if it has none."""
    notes: dict[Any, Any] = getattr(node, "metadata", {})
    return notes


def saved(node: Any, name: str) -> Any:
    """What an autograd node has saved under a name; None if nothing."""
    return getattr(node, f"_saved_{name}", None)


def version_of(value: Any) -> int | None:
    """How often a tensor was changed in place; None if it is unknown."""
    if not isinstance(value, Tensor) or value.is_inference():
        return None
    return getattr(value, "_version", None)


def storage_of(tensor: Tensor) -> Any:
    """A weak reference to a tensor's memory; references to the same memory are equal.

    None for tensors without memory, such as the wrappers of torch.func.
    """
    reference = _found(torch.multiprocessing, "reductions.StorageWeakRef")
    try:
        return None if reference is None else reference(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return None


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    """The dictionaries of a module's forward hooks; empty if a release has other names."""
    names = "_forward_pre_hooks", "_forward_hooks"
    return [hooks for name in names if (hooks := _found(module, name)) is not None]


def is_replica(module: nn.Module) -> bool:
    """Whether a module is a replica of DataParallel; False if it is unknown."""
    return bool(_found(module, "_is_replica"))
