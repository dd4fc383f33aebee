"""scale_free=True: the gradient of the features without the factor 1 / ||x||."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vmap

from separate_loss import SeparateLoss, SoftmaxSeparateLoss, separate_loss
from separate_loss.functional import intra_class_loss
from tests.helpers import reference
from tests.helpers.properties import REDUCTIONS, Problem, assert_equal, problems, property_test

FUNCTIONS = st.sampled_from([separate_loss, intra_class_loss])


def options_of(problem: Problem) -> dict[str, Any]:
    return {"weight": problem.weight, "ignore_index": problem.ignore_index}


@property_test(problem=problems(max_exponent=3))
def test_the_gradient_is_eq_5_times_the_norm(problem: Problem) -> None:
    features, centers = problem.requiring_grad()
    options = options_of(problem)
    loss = separate_loss(features, problem.target, centers, scale_free=True, **options)
    of_features, _ = torch.autograd.grad(loss, (features, centers))
    x, probabilities, c = problem.arrays
    expected = reference.features_gradient(x, probabilities, c, problem.weights)
    if not probabilities.any():
        expected[:] = 0
    norms = problem.features.norm(dim=-1, keepdim=True).numpy()
    assert_equal(of_features, expected * norms, torch.float64)


@property_test(problem=problems(max_exponent=3), reduction=REDUCTIONS, function=FUNCTIONS)
def test_the_loss_and_the_gradient_of_centers_do_not_change(
    problem: Problem, reduction: Any, function: Any
) -> None:
    results = []
    for scale_free in (False, True):
        features, centers = problem.requiring_grad()
        loss = function(
            features, problem.target, centers,
            reduction=reduction, scale_free=scale_free, **options_of(problem),
        )  # fmt: skip
        results.append((loss, torch.autograd.grad(loss.sum(), centers)[0]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@property_test(
    problem=problems(max_exponent=1), dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_the_gradient_is_independent_of_norms(
    problem: Problem, dtype: torch.dtype, seed: int
) -> None:
    """For factors from 1e-15 to 1e15, one for each sample."""
    problem = problem.to(dtype)
    powers = torch.rand(len(problem.features), generator=torch.Generator().manual_seed(seed))
    factors = 10 ** (30 * powers.unsqueeze(-1).to(dtype) - 15)
    gradients = []
    for factor in (torch.ones_like(factors), factors):
        features = (problem.features * factor).requires_grad_()
        loss = separate_loss(
            features, problem.target, problem.centers, scale_free=True, **options_of(problem)
        )
        gradients.append(torch.autograd.grad(loss, features)[0])
    assert_equal(gradients[1], gradients[0].double().numpy(), dtype)


def test_zero_vectors_have_no_gradient() -> None:
    features = torch.randn(3, 4)
    features[1] = 0
    features.requires_grad_()
    separate_loss(features, torch.arange(3), torch.randn(3, 4), scale_free=True).backward()
    assert features.grad is not None
    assert features.grad.any(-1).tolist() == [True, False, True]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_ignored_samples_have_no_gradient(value: float) -> None:
    features = torch.randn(3, 4)
    features[1] = value
    features.requires_grad_()
    target = torch.tensor([0, -100, 2])
    separate_loss(features, target, torch.randn(3, 4), scale_free=True).backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    assert features.grad.any(-1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_do_not_underflow(dtype: torch.dtype) -> None:
    """Eq. 5 underflows in float16 for features of this norm."""
    features = (torch.randn(2000, 4) * 1e4).to(dtype).requires_grad_()
    target, centers = torch.arange(2000) % 3, torch.randn(3, 4)
    separate_loss(features, target, centers, scale_free=True).backward()
    wide = features.detach().float().requires_grad_()
    separate_loss(wide, target, centers, scale_free=True).backward()
    assert features.grad is not None
    assert wide.grad is not None
    assert features.grad.dtype == dtype
    torch.testing.assert_close(features.grad, wide.grad.to(dtype))


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("separation", ["mean", "square"])
def test_derivatives_equal_those_of_a_surrogate(kind: str, separation: Any) -> None:
    """The loss at x + ||x|| (v - x), in v, with x and ||x|| held constant."""
    features = torch.randn(4, 3, dtype=torch.float64)
    centers = torch.randn(5, 3, dtype=torch.float64)
    target: Tensor = torch.tensor([0, 1, 1, 4])
    if kind == "probabilities":
        target = torch.rand(4, 5, dtype=torch.float64).softmax(-1)
    norms = features.norm(dim=-1, keepdim=True)

    def surrogate(value: Tensor) -> Tensor:
        return separate_loss(
            features + norms * (value - features), target, centers, separation=separation
        )

    def loss(value: Tensor) -> Tensor:
        return separate_loss(value, target, centers, scale_free=True, separation=separation)

    tangent = torch.randn_like(features)
    for derivative in (
        grad,
        jacfwd,
        hessian,
        lambda of: lambda value: jvp(of, (value,), (tangent,)),
        lambda of: lambda value: jvp(grad(of), (value,), (tangent,)),
        lambda of: lambda value: vmap(grad(of))(torch.stack([value, value])),
    ):
        torch.testing.assert_close(derivative(loss)(features), derivative(surrogate)(features))
    leaf = features.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    torch.testing.assert_close(first, grad(surrogate)(features))
    rows = [torch.autograd.grad(one, leaf, retain_graph=True)[0] for one in first.flatten()]
    expected = hessian(surrogate)(features).reshape(12, 4, 3)
    torch.testing.assert_close(torch.stack(rows), expected)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_compiled_gradients_equal_uncompiled_ones(kind: str) -> None:
    def step(features: Tensor, target: Tensor, centers: Tensor) -> Tensor:
        return separate_loss(features, target, centers, scale_free=True)

    features, centers = torch.randn(6, 4, requires_grad=True), torch.randn(3, 4)
    target = torch.arange(6) % 3
    if kind == "probabilities":
        target = torch.rand(6, 3).softmax(-1)
    gradients = [
        torch.autograd.grad(call(features, target, centers), features)[0]
        for call in (step, torch.compile(step, fullgraph=True))
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("center_update", ["forward", "gradient", "none"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_centers_of_a_module_move_as_without_scale_free(
    center_update: Any, autocast: bool
) -> None:
    plain = SeparateLoss(3, 4, center_update=center_update)
    if center_update == "none":
        plain.centers.normal_()
    free = copy.deepcopy(plain)
    free.scale_free = True
    optimizers = [torch.optim.SGD([torch.zeros(1), *one.parameters()]) for one in (plain, free)]
    for _ in range(3):
        features = torch.randn(7, 4) * torch.logspace(-2, 2, 7).unsqueeze(-1)
        gradients = []
        for criterion, optimizer in zip((plain, free), optimizers, strict=True):
            leaf = features.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = criterion(leaf, torch.arange(7) % 3)
            loss.backward()
            optimizer.step()
            gradients.append(leaf.grad)
        torch.testing.assert_close(gradients[0] * features.norm(dim=-1, keepdim=True), gradients[1])
        assert torch.equal(plain.centers, free.centers)


def test_the_joint_loss_scales_its_separate_part_only() -> None:
    head = torch.nn.Linear(4, 3)
    centers = torch.randn(3, 4)
    features, target = torch.randn(5, 4) * 20, torch.tensor([0, 1, 2, 0, 1])
    gradients = []
    for scale_free in (False, True):
        criterion = SoftmaxSeparateLoss(head, center_init=centers, scale_free=scale_free)
        leaf = features.clone().requires_grad_()
        softmax = torch.nn.functional.cross_entropy(head(leaf), target)
        (alone,) = torch.autograd.grad(softmax, leaf)
        gradients.append(torch.autograd.grad(criterion(head(leaf), target), leaf)[0] - alone)
    torch.testing.assert_close(
        gradients[0] * features.norm(dim=-1, keepdim=True), gradients[1], rtol=1e-3, atol=1e-6
    )


def test_vmap_over_an_ensemble_equals_a_loop() -> None:
    criterion = SeparateLoss(3, 4, center_update="gradient", scale_free=True)
    features, target = torch.randn(2, 5, 4), torch.tensor([0, 1, 2, 0, 1])
    centers = torch.randn(2, 3, 4)

    def loss(features: Tensor, centers: Tensor) -> Tensor:
        result: Tensor = functional_call(criterion, {"centers": centers}, (features, target))
        return result

    together = vmap(grad(loss))(features, centers)
    for i in range(2):
        torch.testing.assert_close(together[i], grad(loss)(features[i], centers[i]))


@pytest.mark.parametrize("value", [1, "yes", None])
def test_values_other_than_bool_are_refused(value: Any) -> None:
    vectors, target = torch.randn(3, 4), torch.arange(3)
    for call in (
        lambda: separate_loss(vectors, target, vectors, scale_free=value),
        lambda: intra_class_loss(vectors, target, vectors, scale_free=value),
        lambda: SeparateLoss(3, 4, scale_free=value),
    ):
        with pytest.raises(TypeError, match="scale_free must be a bool, got"):
            call()
