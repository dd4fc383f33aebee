"""Derivatives of the Triton kernels, and the calls for which PyTorch operators run instead."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

from separate_loss import SeparateLoss, separate_loss
from tests.helpers.triton_steps import random_problem, uses_kernels

pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    # NumPy, which runs the interpreter's operations, warns where a GPU does not.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


def test_first_and_second_derivatives() -> None:
    problem = random_problem(3, 2, 3, torch.float64)
    problem.target[1] = -100
    features, centers = problem.requiring_grad()

    def loss(features: Tensor, centers: Tensor) -> Tensor:
        return separate_loss(features, problem.target, centers)

    for leaves in ((features, centers), (features, problem.centers), (problem.features, centers)):
        assert gradcheck(loss, leaves, check_batched_grad=True)
        assert gradgradcheck(loss, leaves)


def test_vmap_over_the_backward_pass() -> None:
    problem = random_problem(4, 3, 5)
    features, centers = problem.requiring_grad()
    loss = separate_loss(features, problem.target, centers)
    assert uses_kernels(loss)

    def gradients(by: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (features, centers), by, retain_graph=True)

    features_grad, centers_grad = vmap(gradients)(torch.tensor([1.0, 2.0]))
    for i in range(2):
        torch.testing.assert_close(
            (features_grad[i], centers_grad[i]), gradients(torch.tensor(i + 1.0))
        )


def test_gradients_use_the_centers_before_the_update() -> None:
    criterion = SeparateLoss(4, 3, center_init="sphere", dtype=torch.float64)
    problem = random_problem(5, 3, 4, torch.float64)
    features, _ = problem.requiring_grad()
    before = criterion.centers.clone()
    loss = criterion(features, problem.target)
    assert not torch.equal(criterion.centers, before)
    (first,) = torch.autograd.grad(loss, features, create_graph=True)
    expected = separate_loss(features, problem.target, before)
    (expected_first,) = torch.autograd.grad(expected, features, create_graph=True)
    torch.testing.assert_close(first, expected_first)
    torch.testing.assert_close(
        torch.autograd.grad(first.square().sum(), features),
        torch.autograd.grad(expected_first.square().sum(), features),
    )


def test_pytorch_operators_run_what_kernels_do_not_support() -> None:
    problem = random_problem(4, 3, 5)
    features, target, centers = problem.features, problem.target, problem.centers
    leaf, _ = problem.requiring_grad()
    calls: list[tuple[Tensor, dict[str, Any]]] = [
        (torch.rand(4, 5), {}),
        (target, {"weight": torch.rand(5)}),
        (target, {"reduction": "sum"}),
        (target, {"reduction": "none"}),
    ]
    for one, options in calls:
        loss = separate_loss(leaf, one, centers, **options)
        assert not uses_kernels(loss)

    def loss_of(features: Tensor) -> Tensor:
        return separate_loss(features, target, centers)

    (expected,) = torch.autograd.grad(loss_of(leaf), leaf)
    torch.testing.assert_close(grad(loss_of)(features), expected)
    slope = jvp(loss_of, (features,), (features,))[1]
    torch.testing.assert_close(slope, torch.zeros(()))
    batch = torch.stack([features, features * 2])
    torch.testing.assert_close(vmap(loss_of)(batch), loss_of(features).expand(2))
