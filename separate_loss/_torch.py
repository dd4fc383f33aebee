"""What is private in PyTorch or missing from older releases, each use under a name of its own.

Every function says what it does where a release lacks what it uses. Nothing else in the package
uses a private name of torch.
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
    """Whether forward-mode differentiation is on; where nothing tells, yes."""
    return bool(getattr(forward_ad, "_current_level", 0) >= 0)


def in_transform() -> bool:
    """Whether a transform of torch.func or forward mode is on; where nothing tells, yes."""
    active = _found(torch._C, "_are_functorch_transforms_active")
    return active is None or active() or in_forward_mode()


def in_autocast(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    if torch.compiler.is_compiling():
        # The compiler of 2.6 traces no `is_autocast_available`.
        return device in {"cpu", "cuda", "xpu", "mps"} and torch.is_autocast_enabled(device)
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def under_vmap(tensor: Tensor) -> bool:
    """Whether a tensor stands for a batch of them; where nothing tells, if it is no plain one."""
    functorch = _found(torch._C, "_functorch")
    if functorch is None:
        return type(tensor) not in (Tensor, nn.Parameter)
    if functorch.is_legacy_batchedtensor(tensor):  # is_grads_batched=True
        return True
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def assert_on_device(condition: Tensor, message: str) -> None:
    """Fails on the device, without a wait for its value; nothing where a release has no such."""
    check = _found(torch, "_assert_async")
    if check is not None:
        check(condition, message)


def not_compiled(function: Function) -> Function:
    """Leaves a function to Python in compiled code, as torch.compiler.disable does.

    That would load the whole compiler at import. Where the mark means nothing, the compiler tries
    to trace the function, and breaks the graph within.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def compiler_moves_buffers() -> bool:
    """Whether compiled code changes a buffer once; before 2.8, the backward pass does it again."""
    return RELEASE >= (2, 8)


def is_exporting() -> bool:
    """Whether torch.export traces; never before 2.7, which cannot tell it from compiling."""
    exporting = _found(torch.compiler, "is_exporting")
    return exporting is not None and bool(exporting())


def in_backward() -> bool:
    """Whether this thread runs a backward pass; never where nothing tells."""
    task = _found(torch._C, "_current_graph_task_id")
    return task is not None and task() != -1


def backward_keeps_graph() -> bool:
    """Whether the backward pass of this thread leaves its graph alive; where nothing tells, yes."""
    keeps = _found(torch._C, "_autograd._get_current_graph_task_keep_graph")
    return keeps is None or bool(keeps())


def notes_on(node: Any) -> dict[Any, Any]:
    """A dictionary that lives with a node of autograd's graph; one that does not, without any."""
    notes: dict[Any, Any] = getattr(node, "metadata", {})
    return notes


def saved(node: Any, name: str) -> Any:
    """What a node of autograd's graph has saved under a name; None without any."""
    return getattr(node, f"_saved_{name}", None)


def version_of(value: Any) -> int | None:
    """How often a tensor was changed in place; None where nothing counts that."""
    if not isinstance(value, Tensor) or value.is_inference():
        return None
    return getattr(value, "_version", None)


def storage_of(tensor: Tensor) -> Any:
    """A weak reference to a tensor's memory, equal to others of the same; None without any.

    Wrappers, as those of torch.func, have no memory of their own.
    """
    reference = _found(torch.multiprocessing, "reductions.StorageWeakRef")
    try:
        return None if reference is None else reference(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return None


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    """The forward hooks of a module, to remove some; none without any."""
    names = "_forward_pre_hooks", "_forward_hooks"
    return [hooks for name in names if (hooks := _found(module, name)) is not None]


def is_replica(module: nn.Module) -> bool:
    """Whether a module is a replica of DataParallel; never where nothing tells."""
    return bool(_found(module, "_is_replica"))
