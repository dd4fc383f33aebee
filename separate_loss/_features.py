"""From logits back to the head's output that they hold, and so to the features noted for it."""

import re
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from separate_loss import _torch
from separate_loss._checks import dim_of, dims_of
from separate_loss._watch import MAX_FEATURES, MAX_VALUES, ForwardPass, Head, note

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
# fmt: on
# Of DistributedDataParallel and backward hooks: each output is the input of the same number.
PASSING = {"_DDPSinkBackward", "BackwardHookFunctionBackward"}
HINTS = dict.fromkeys(
    ("Index", "IndexSelect", "MaskedSelect", "Select", "Slice", "Split", "Unbind"),
    "To leave samples out, keep all logits and set their labels to ignore_index.\n",
) | {
    "GatherBackward": "The model runs in torch.nn.DataParallel, whose replicas each see a part of "
    "the batch; use torch.nn.parallel.DistributedDataParallel.\n"
}
NO_PASS = (
    "no forward pass of the watched head has led to logits; call watch(head) with the head that "
    "runs (a copied or unpickled loss needs that, unless its head was copied with it)"
)
Step = tuple[Any, int]  # a node of autograd's graph, and the number of its output
Found = tuple[ForwardPass, int, str | None]


def find(logits: Tensor, class_dim: int, heads: list[Head]) -> Found:
    """The pass that logits come from, their class dimension, and what changed their values.

    `class_dim`, 1 or -1, is that of the head. Raises RuntimeError unless logits hold the output of
    one pass of one of the heads, with the samples in the same order.
    """
    if torch.compiler.is_dynamo_compiling():
        for head in heads:
            for number, (output, new) in enumerate(head.compiled):
                if output is logits:
                    # Tensors that are kept would become outputs of the compiled function.
                    head.compiled = head.compiled[:number] + head.compiled[number + 1 :]
                    return _checked(new), dim_of(class_dim, logits.shape), None
        found: Found = _torch.run_uncompiled(find, logits, class_dim, heads)
        return found
    for head in heads:  # the usual case, in short
        noted = _torch.notes_of(logits.grad_fn).get((head, logits.output_nr))
        if noted and noted.output_version == _torch.version_of(logits):
            return _checked(noted), dim_of(class_dim, logits.shape), None
    if not heads:
        raise RuntimeError("no head is watched; call watch(head) first")
    for head in heads:
        compiled, head.compiled = head.compiled, ()
        for output, new in compiled:
            with suppress(RuntimeError):  # The next CUDA graph may have taken the memory.
                note(new, output)
    way = _without_graph if logits.grad_fn is None else _by_graph
    noted, dim, changed_by = way(logits, class_dim, heads)
    return _checked(noted), dim, changed_by


def _checked(noted: ForwardPass) -> ForwardPass:
    """The pass, if its features are there as the head has seen them."""
    if noted.features is None and noted.requires_grad:
        raise RuntimeError("backward has freed the graph of the pass; call the loss before")
    if noted.features is None:
        raise RuntimeError(f"without a graph, the features of {MAX_FEATURES} outputs are kept")
    if noted.version is not None and noted.version != _torch.version_of(noted.features):
        raise RuntimeError(
            "the head's input was changed in place, by the head or after it; use operators that "
            "are not in place, such as torch.nn.ReLU(inplace=False), or watch the layer inside"
        )
    return noted


def _by_graph(logits: Tensor, class_dim: int, heads: list[Head]) -> Found:
    passes, (node, number), operators = _walk(logits, heads)
    changed_by = next((_name(one) for one, _ in operators if _kind(one) in VALUES), None)
    if number not in passes:  # Compiled code returned something else too, such as a cast.
        return *_by_values(logits, class_dim, [*passes.values()])[:2], changed_by
    noted = passes[number]
    dim = _dim_after(operators, logits, class_dim, noted.sizes)
    if all(_kind(operator) in VIEWS for operator, _ in operators):
        _check_output(noted, logits, dim, class_dim)
    elif (output := noted.output()) is not None and output.grad_fn is node:
        _check_output(noted, output, dim_of(class_dim, noted.sizes), class_dim)
    return noted, dim, changed_by


def _walk(logits: Tensor, heads: list[Head]) -> tuple[dict[int, ForwardPass], Step, list[Step]]:
    """The passes that one node has computed, its step, and the operators from there to the logits.

    Visits each node once.
    """
    steps: list[Step] = [(logits.grad_fn, logits.output_nr)]
    users: dict[Step, dict[Step, None]] = {}
    found, others = [], set[Any]()
    for step in steps:
        node, number = step
        notes = _torch.notes_of(node)
        if passes := {key[1]: noted for key, noted in notes.items() if key[0] in heads}:
            found.append((passes, step))
            continue
        others.update([node.name()], map(type, notes.values()))
        inputs = node.next_functions
        for branch in inputs[number : number + 1] if node.name() in PASSING else inputs:
            if branch not in users and branch[0] is not None:
                steps.append(branch)
            users.setdefault(branch, {})[step] = None
    if not found and ForwardPass in others:
        raise _refused(NO_PASS.replace("no forward pass of the watched head", "another head"))
    if not found:
        reentrant = "; a head in torch.utils.checkpoint needs use_reentrant=False"
        raise _refused(NO_PASS + reentrant * ("CheckpointFunctionBackward" in others))
    passes, start = found[0]
    chain = [start]
    while chain[-1] != steps[0]:
        step, *more = users[chain[-1]]
        if more or len(found) > 1:
            names = " and ".join(repr(_name(user)) for user, _ in (step, *more))
            reason = f"operator {names} joins several passes, or one with itself"
            raise _refused(reason, step[0])
        chain.append(step)
    operators = [step for step in chain[1:] if step[0].name() not in PASSING]
    for node, _ in operators:
        if _kind(node) not in IN_ORDER:
            reason = f"operator {_name(node)!r} stands between the head's output and logits"
            raise _refused(reason, node)
    return passes, start, operators


def _dim_after(
    operators: list[Step], logits: Tensor, class_dim: int, sizes: tuple[int, ...]
) -> int:
    """The class dimension, 1 or the last, if the operators after an output kept the samples."""
    place = dim_of(class_dim, sizes)
    for dim in sorted(dims_of(logits.shape), reverse=class_dim == -1):
        # A view with the classes outermost in memory goes back through the operators.
        samples = [*logits.shape[:dim], *logits.shape[dim + 1 :]]
        view = torch.empty(sizes[place], *samples, device="meta").movedim(0, dim)
        with suppress(RuntimeError):  # Samples were mixed, so that there is no such view.
            for node, number in reversed(operators):
                view = view.view(_torch.sizes_of(node, number))
                view = node(view) if _kind(node) in REORDERING else view
            if view.view(sizes).movedim(place, 0).is_contiguous():
                return dim
    names = ", ".join(repr(_name(node)) for node, _ in operators)
    raise _refused(
        f"operators {names} moved samples, or classes to other dimensions than 1 and the last"
    )


def _without_graph(logits: Tensor, class_dim: int, heads: list[Head]) -> Found:
    notes, start = _torch.memory_of(logits) or {}, logits.storage_offset()
    passes = [one for head in heads if (one := notes.get((head, start), lambda: None)())]
    if passes and passes[0].layout == (logits.shape, logits.stride(), logits.dtype):
        dim = dim_of(class_dim, logits.shape)
        _check_output(passes[0], logits, dim, class_dim)
        return passes[0], dim, None
    latest = [noted for head in heads for noted in reversed(head.latest) if noted]
    return _by_values(logits, class_dim, passes or latest)


def _by_values(logits: Tensor, class_dim: int, passes: list[ForwardPass]) -> Found:
    """The pass whose output has the values of logits, perhaps cast to another type."""
    fits = [(one, dim) for one in passes for dim in _dims_with_values(one, logits, class_dim)]
    if not fits:
        recent = "logits without a graph must be a recent output of the head, a view of one, or a "
        raise _refused(f"{recent}cast of one of the latest {MAX_VALUES}" if passes else NO_PASS)
    (noted, dim), *others = fits
    rows = logits.detach().movedim(dim, -1).reshape(-1, logits.shape[dim])
    same = len(rows) > 1 and bool((rows == rows[:1]).all())
    if same or any(at != dim or not _equal(one.features, noted.features) for one, at in others):
        raise _refused("logits have the same values for several samples, dimensions or passes")
    return noted, dim, None


def _check_output(noted: ForwardPass, tensor: Tensor, dim: int, class_dim: int) -> None:
    """Refuses an output, or a view of it, that was changed in place."""
    same = noted.output_version == _torch.version_of(tensor)
    if noted.output_version is None:  # compiled, or in inference mode
        same = noted.values is None or dim in _dims_with_values(noted, tensor, class_dim)
    if not same:
        raise _refused("logits were changed in place after the head had returned them")


def _dims_with_values(noted: ForwardPass, tensor: Tensor, class_dim: int) -> list[int]:
    """The dimensions of a tensor that, taken for the classes, give the rows of an output."""
    values = noted.output() if noted.values is None else noted.values
    if values is None:
        return []
    rows = values.movedim(dim_of(class_dim, noted.sizes), -1)
    return [dim for dim in dims_of(tensor.shape) if _equal(tensor.movedim(dim, -1), rows)]


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether both hold the same rows, in the type of one."""
    if (one.device, one.numel(), one.shape[-1]) != (other.device, other.numel(), other.shape[-1]):
        return False
    other = other.detach().to(one.dtype).reshape(one.shape)
    return torch.allclose(one.detach(), other, rtol=0, atol=0, equal_nan=True)


def _kind(node: Any) -> str:
    """The name of an operator of PyTorch, such as IndexSelect for IndexSelectBackward0."""
    return re.sub(r"Backward\d+$", "", node.name())


def _name(node: Any) -> str:
    """The Python name of an operator, such as index_select."""
    name = re.sub(r".*::|Backward.*", "", node.name())
    return re.sub("([A-Z])", r"_\1", name).lower().strip("_")


def _refused(reason: str, node: Any = None) -> RuntimeError:
    hint = "" if node is None else HINTS.get(_kind(node), "")
    return RuntimeError(
        f"{reason}; logits must hold the output of one forward pass of the watched head, sample by "
        f"sample in the same order\n{hint}If you have the features of each sample, pass them:\n"
        "    features = ...  # the input of the head, in the order of the logits\n"
        "    loss = criterion(logits, target, features=features)"
    )
