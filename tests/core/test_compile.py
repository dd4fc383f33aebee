"""torch.compile: one graph for all batch sizes, and the same results as without."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap

from separate_loss import SeparateLoss, separate_loss
from separate_loss import functional as F
from separate_loss._torch import compiler_moves_buffers
from tests.helpers.releases import needs_compiled_transforms

NUM_CLASSES, FEATURE_DIM = 7, 16
SIZES = [8, 5, 32, 17]


def batch(kind: str, size: int) -> tuple[Tensor, Tensor]:
    features = torch.randn(size, FEATURE_DIM)
    if kind == "probabilities":
        return features, torch.rand(size, NUM_CLASSES).softmax(-1)
    target = torch.randint(NUM_CLASSES, (size,))
    if kind == "ignoring":
        target[0] = -100
    return features, target


def compiled(function: Any, fullgraph: bool = True) -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("inductor")
    return torch.compile(function, fullgraph=fullgraph, dynamic=True, backend=counter), counter


@pytest.mark.parametrize(
    ("kind", "reduction"),
    [("indices", "mean"), ("ignoring", "none"), ("probabilities", "mean")],
)
def test_the_loss_compiles_to_one_graph(kind: str, reduction: Any) -> None:
    def loss(features: Tensor, target: Tensor, centers: Tensor) -> Tensor:
        return separate_loss(features, target, centers, reduction=reduction).sum()

    fast, counter = compiled(loss)
    graphs = set()
    for size in SIZES:
        features, target = batch(kind, size)
        centers = torch.randn(NUM_CLASSES, FEATURE_DIM)
        results = []
        for function in (loss, fast):
            leaves = features.clone().requires_grad_(), centers.clone().requires_grad_()
            value = function(leaves[0], target, leaves[1])
            results.append((value, *torch.autograd.grad(value, leaves)))
        torch.testing.assert_close(*results)
        graphs.add(counter.frame_count)
    # The first call is traced twice, as floats are first taken for variables.
    assert graphs in ({1}, {2})


@pytest.mark.parametrize(
    ("kind", "center_update"),
    [
        ("indices", "forward"),
        ("probabilities", "forward"),
        ("indices", "gradient"),
        ("indices", "none"),
    ],
)
def test_the_module_compiles_to_one_graph(kind: str, center_update: Any) -> None:
    plain = SeparateLoss(NUM_CLASSES, FEATURE_DIM, center_update=center_update)
    twin = copy.deepcopy(plain)
    moves = compiler_moves_buffers(by_probabilities=kind == "probabilities")
    one_graph = moves or center_update != "forward"
    fast, counter = compiled(twin, fullgraph=one_graph)
    graphs = []
    for size in SIZES:
        features, target = batch(kind, size)
        results = []
        for criterion, call in ((plain, plain), (twin, fast)):
            leaf = features.clone().requires_grad_()
            loss = call(leaf, target)
            loss.backward()
            assert criterion.last_terms is not None
            grads = leaf.grad, criterion.centers.grad
            results.append((loss, grads, criterion.centers.detach().clone(), criterion.last_terms))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
        graphs.append(counter.frame_count)
    assert graphs[0] in ({1, 2} if one_graph else {0})
    assert set(graphs) == {graphs[0]}


def test_update_centers_compiles_to_one_graph() -> None:
    def update(features: Tensor, target: Tensor, centers: Tensor) -> Tensor:
        return F.update_centers(features, target, centers, center_lr=0.5)

    fast, counter = compiled(update)
    graphs = set()
    for size in SIZES:
        arguments = *batch("indices", size), torch.randn(NUM_CLASSES, FEATURE_DIM)
        torch.testing.assert_close(fast(*arguments), update(*arguments))
        graphs.add(counter.frame_count)
    assert graphs in ({1}, {2})


def test_labels_out_of_range_are_refused() -> None:
    fast, _ = compiled(separate_loss)
    features, target = batch("indices", 4)
    target[1] = NUM_CLASSES
    with pytest.raises(RuntimeError, match=r"target must hold class indices|index out of bounds"):
        fast(features, target, torch.randn(NUM_CLASSES, FEATURE_DIM))


@needs_compiled_transforms
@pytest.mark.parametrize("form", ["simplex", "paper"])
def test_vmap_with_batched_labels_compiles(form: Any) -> None:
    """Losses of many batches, and the gradients of each sample; before, the compiler failed."""
    features, target = batch("ignoring", 12)
    centers = torch.randn(NUM_CLASSES, FEATURE_DIM)
    centers[2] = features[3] = 0

    def loss(features: Tensor, target: Tensor, centers: Tensor) -> Tensor:
        return separate_loss(features, target, centers, form=form)

    def of_sample(features: Tensor, target: Tensor, centers: Tensor) -> Tensor:
        return loss(features[None], target[None], centers)

    cases: list[tuple[Any, tuple[Tensor, Tensor]]] = [
        (loss, (features.unflatten(0, (3, 4)), target.unflatten(0, (3, 4)))),
        (grad(of_sample, argnums=(0, 2)), (features, target)),
    ]
    for function, inputs in cases:
        mapped = vmap(function, in_dims=(0, 0, None))
        fast = torch.compile(mapped, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(fast(*inputs, centers), mapped(*inputs, centers))


@pytest.mark.parametrize("shape", [(7, 64), (40, 8), (2, 3)])
@pytest.mark.parametrize("form", ["simplex", "paper"])
@pytest.mark.parametrize(("dynamic", "center_init"), [(None, "features"), (True, "sphere")])
def test_class_probabilities_update_the_centers_in_place(
    shape: tuple[int, int], form: Any, dynamic: bool | None, center_init: Any
) -> None:
    """Earlier code raised KeyError in the compiler's C++ code generator for some of these."""
    torch._dynamo.reset()
    plain = SeparateLoss(*shape, form=form, center_init=center_init)
    twin = copy.deepcopy(plain)
    fast = torch.compile(twin, dynamic=dynamic)
    features = torch.randn(8, shape[1], requires_grad=True)
    target = torch.rand(8, shape[0]).softmax(-1)
    for call in (plain, fast):
        call(features, target).backward()
    torch.testing.assert_close(twin.centers, plain.centers)
