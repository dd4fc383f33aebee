"""Records a module's input so that it can be found from the output."""

import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from separate_loss._layout import class_dim_after, class_dim_of_view, dim_of, keeps_samples
from separate_loss._torch import (
    backward_keeps_graph,
    hooks_of,
    in_backward,
    is_exporting,
    is_replica,
    metadata_of,
    not_compiled,
    storage_of,
    version_of,
)

# How many passes are kept of those without a graph, and of compiled ones.
MAX_PASSES, MAX_COMPILED = 8, 4

HOW_TO_PASS_FEATURES = (
    "\nIf you have the features of each sample, pass them:\n"
    "    features = ...  # the input of the head, in the order of the logits\n"
    "    loss = criterion(logits, target, features=features)"
)
HOW_TO_IGNORE = "\nTo leave samples out, keep all logits and set their labels to ignore_index."


class ForwardPass:
    """A forward pass of the recorded module."""

    def __init__(
        self, features: Any, version: int | None, training: bool, recorded: bool, output: Tensor
    ) -> None:
        self.features = features
        self.version = version  # of the features; in-place operators increment it
        self.training = training  # the module's mode
        self.recorded = recorded  # whether autograd was on
        self.sizes = output.shape
        self.moved = False  # whether this pass has updated the centers

    def release_after_backward(self, node: Any) -> None:
        """Releases the features when the backward pass frees the graph of `node`."""
        reference = weakref.ref(self)

        def after_backward(*_: object) -> None:
            forward_pass = reference()
            if forward_pass is not None and not backward_keeps_graph():
                forward_pass.features = None

        node.register_hook(after_backward)


class Output:
    """A pass that is not stored on a node of autograd's graph, found by its output's memory."""

    def __init__(self, forward_pass: ForwardPass, output: Tensor) -> None:
        self.forward_pass = forward_pass
        self.node, self.number = output.grad_fn, output.output_nr
        self.storage = storage_of(output)
        self.version = version_of(output)
        self.strides, self.offset, self.dtype = (
            output.stride(),
            output.storage_offset(),
            output.dtype,
        )

    def gone(self) -> bool:
        """Whether the output no longer exists."""
        return self.node is None and (self.storage is None or self.storage.expired())

    def shares_storage(self, logits: Tensor) -> bool:
        """Whether logits start at the output's memory and have its type."""
        return (
            self.storage is not None
            and self.storage == storage_of(logits)
            and (self.offset, self.dtype) == (logits.storage_offset(), logits.dtype)
        )


class Recorder:
    """Records the forward passes of a module, and finds the pass that logits were computed by.

    A pass is stored in the metadata of its output's `grad_fn`: it is freed with the graph, and
    found by walking back from the logits. The latest passes without a graph, and the latest
    compiled passes, whose nodes have no metadata, are stored here.
    """

    def __init__(self) -> None:
        self.hooks = _Hook(self.before_forward), _Hook(self.after_forward)
        self.handles: tuple[Any, ...] = ()
        self.active = True
        self.module: weakref.ref[nn.Module] | None = None
        self.seen = False  # whether any pass was recorded
        self.parallel = False  # whether DataParallel has run replicas
        self.versions: dict[
            int, int | None
        ] = {}  # of the features before the module ran, by thread
        self.passes: tuple[Output, ...] = ()
        self.lock = threading.Lock()  # for `passes`: one thread may evaluate while another trains
        self.compiled: tuple[Any, ...] = ()

    def attach(self, module: nn.Module) -> None:
        """Starts recording."""
        _remove_stale_hooks(module)
        self.module = weakref.ref(module)
        before_forward, after_forward = self.hooks
        self.handles = (
            module.register_forward_pre_hook(before_forward, with_kwargs=True),
            module.register_forward_hook(after_forward, with_kwargs=True),
        )

    def detach(self) -> None:
        """Ends recording."""
        self.active = False
        for handle in self.handles:
            handle.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, self.hooks

    def before_forward(self, _: nn.Module, inputs: tuple[Any, ...], named: Any = None) -> None:
        """Runs before the module."""
        if not self.active or torch.compiler.is_compiling() or in_backward():
            return
        self.versions[threading.get_ident()] = version_of(_first(inputs, named))

    def after_forward(self, module: nn.Module, inputs: tuple[Any, ...], *others: Any) -> None:
        """Runs after the module, in quantization without its keyword arguments."""
        if not self.active or is_exporting():
            return
        features, output = _first(inputs, others[0] if len(others) > 1 else None), others[-1]
        training, recorded = module.training, torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            latest = self.compiled[1 - MAX_COMPILED :]
            self.compiled = (*latest, (features, output, training, recorded))
            return
        if in_backward():
            # Activation checkpointing runs the module a second time.
            return
        self.module, self.seen = weakref.ref(module), True
        self.parallel = self.parallel or is_replica(module)
        version = self.versions.pop(threading.get_ident(), None)
        for leaf in _outputs(output, features):
            forward_pass = ForwardPass(features, version, training, recorded, leaf)
            if leaf.grad_fn is None:
                self._keep(Output(forward_pass, leaf))
            else:
                node: Any = leaf.grad_fn
                metadata_of(node).setdefault(self, {})[leaf.output_nr] = forward_pass
                forward_pass.release_after_backward(node)

    def take_compiled(self, logits: Tensor) -> ForwardPass | None:
        """The pass in the same compiled function whose output is logits; removes it."""
        for number, (features, output, training, recorded) in enumerate(self.compiled):
            if output is logits:
                # Tensors that are kept would become outputs of the compiled function.
                self.compiled = self.compiled[:number] + self.compiled[number + 1 :]
                return ForwardPass(features, None, training, recorded, output)
        return None

    @not_compiled
    def find(self, logits: Tensor, class_dim: int) -> tuple[ForwardPass, int]:
        """The pass that logits were computed by, and the class dimension of logits.

        `class_dim` is that of the output, 1 or -1. Raises RuntimeError unless logits hold the
        output of exactly one pass, with the samples in the same order.
        """
        self._collect_compiled()
        forward_pass, dim = self._find(logits, class_dim)
        if forward_pass.features is None:
            raise self._refused("backward has freed the graph of the pass; call the loss before")
        if dim not in (1, logits.ndim - 1):
            raise self._refused(f"logits have the classes in dimension {dim}, not in 1 or the last")
        return forward_pass, dim

    def _find(self, logits: Tensor, class_dim: int) -> tuple[ForwardPass, int]:
        for kept in reversed(self.passes):
            if kept.shares_storage(logits) and kept.version == version_of(logits):
                sizes = kept.forward_pass.sizes
                dim = class_dim_of_view(logits, sizes, kept.strides, dim_of(class_dim, sizes))
                if dim is None:
                    raise self._refused(
                        "logits are a view of the head's output with samples left out or moved"
                    )
                return kept.forward_pass, dim
        if logits.grad_fn is None:
            raise self._refused(
                "logits without a graph must be a recent output of the head or a view of one"
            )
        forward_pass, operators = self._walk(logits)
        found = class_dim_after(
            operators, forward_pass.sizes, logits.shape, dim_of(class_dim, forward_pass.sizes)
        )
        if isinstance(found, str):
            raise self._refused(f"operator {found!r} stands between the head's output and logits")
        return forward_pass, found

    def _walk(self, logits: Tensor) -> tuple[ForwardPass, list[Any]]:
        """The pass, and the operators from logits back to its output."""
        operators: list[Any] = []
        node, number = logits.grad_fn, logits.output_nr
        while True:
            forward_pass = self._at(node, number)
            if forward_pass is not None:
                return forward_pass, operators
            branches = _inputs_of(node)
            if not keeps_samples(node) or len(branches) > 1:
                branches = [branch for branch in branches if self._reaches(branch)]
            if not branches:
                raise self._refused("no forward pass of the watched head has led to logits")
            if not keeps_samples(node):
                raise self._refused(
                    f"operator {_operator(node)!r} stands between the head's output and logits",
                    node,
                )
            if len(branches) > 1:
                raise self._refused(
                    f"operator {_operator(node)!r} joins several passes, or one with itself"
                )
            operators.append(node)
            node, number = branches[0]

    def _at(self, node: Any, number: int) -> ForwardPass | None:
        for kept in reversed(self.passes):
            if kept.node is node and kept.number == number:
                return kept.forward_pass
        forward_pass: ForwardPass | None = metadata_of(node).get(self, {}).get(number)
        return forward_pass

    def _reaches(self, branch: tuple[Any, int]) -> bool:
        seen, ahead = {branch}, [branch]
        while ahead:
            node, number = ahead.pop()
            if self._at(node, number) is not None:
                return True
            further = [other for other in _inputs_of(node) if other not in seen]
            seen.update(further)
            ahead += further
        return False

    def _keep(self, kept: Output) -> None:
        with self.lock:
            alive = [old for old in self.passes if not old.gone()]
            self.passes = (*alive[1 - MAX_PASSES :], kept)

    def _collect_compiled(self) -> None:
        compiled, self.compiled = self.compiled, ()
        self.seen = self.seen or bool(compiled)
        for features, output, training, recorded in compiled:
            for leaf in _outputs(output, features):
                forward_pass = ForwardPass(features, version_of(features), training, recorded, leaf)
                self._keep(Output(forward_pass, leaf))
                if leaf.grad_fn is not None:
                    forward_pass.release_after_backward(leaf.grad_fn)

    def _refused(self, reason: str, node: Any = None) -> RuntimeError:
        text = (
            f"{reason}; logits must hold the output of one forward pass of the watched head, "
            "sample by sample in the same order"
        )
        if self.parallel or (node is not None and node.name() == "GatherBackward"):
            text += (
                "\nThe model runs in torch.nn.DataParallel, whose replicas each see a part of the "
                "batch; use torch.nn.parallel.DistributedDataParallel."
            )
        elif not self.seen:
            text += (
                "\nThe watched head has had no forward pass. Create the loss before a compiled "
                "model first runs, and watch(head) the head that runs; a copied or unpickled loss "
                "needs that, unless its head was copied with it."
            )
        if node is not None and _operator(node) in SELECTING:
            text += HOW_TO_IGNORE
        return RuntimeError(text + HOW_TO_PASS_FEATURES)


SELECTING = ("slice", "select", "index", "index_select", "masked_select", "split", "unbind")


class _Hook:
    """A hook whose copies and pickles do nothing and need nothing but Python.

    If its recorder is copied too, the copied recorder makes the copied hook work again.
    """

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    def __call__(self, *arguments: Any) -> None:
        self.call(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (nullcontext().__exit__,)


def _rebuild(before_forward: Any, after_forward: Any) -> Recorder:
    """Attaches a new recorder to two copied hooks."""
    recorder = Recorder()
    for hook, live in zip((before_forward, after_forward), recorder.hooks, strict=True):
        hook.__setstate__((live, (), {}, None))
    return recorder


def _remove_stale_hooks(module: nn.Module) -> None:
    """Removes copied hooks that no loss uses."""
    for hooks in hooks_of(module):
        for key, hook in list(hooks.items()):
            call: Any = hook
            while isinstance(call, partial):
                call = call.func
            recorder = getattr(getattr(call, "call", None), "__self__", None)
            stale = isinstance(recorder, Recorder) and not recorder.active
            if stale or getattr(call, "__func__", None) is nullcontext.__exit__:
                del hooks[key]


def _first(inputs: tuple[Any, ...], named: dict[str, Any] | None) -> Any:
    return inputs[0] if inputs else next(iter((named or {}).values()), None)


def _outputs(output: Any, features: Any) -> list[Tensor]:
    leaves = [output] if isinstance(output, Tensor) else tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf is not features]


def _inputs_of(node: Any) -> list[tuple[Any, int]]:
    """The nodes of an operator's inputs, without parameters and constants."""
    return [
        branch
        for branch in node.next_functions
        if branch[0] is not None and not branch[0].name().endswith("AccumulateGrad")
    ]


def _operator(node: Any) -> str:
    """The Python name of an operator, such as index_select for IndexSelectBackward0."""
    name = node.name().rsplit("::", 1)[-1].split("Backward")[0]
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).strip("_")
