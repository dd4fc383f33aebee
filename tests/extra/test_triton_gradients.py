"""Derivatives of the Triton kernels, and the calls for which PyTorch's operators run instead."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

from separate_loss import SeparateLoss, SoftmaxSeparateLoss, separate_loss
from separate_loss._triton import backend
from tests.helpers.triton_steps import random_problem, shrink_constants, uses_kernels

pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    # NumPy, which runs the interpreter's operations, warns where a GPU does not.
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


@pytest.mark.parametrize("form", ["simplex", "paper"])
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_second_derivatives_equal_those_of_operators(
    form: Any, needed: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = random_problem(5, 3, 4, torch.float64)
    problem.target[1] = -100
    weight, found = torch.rand(4).double(), []
    for name in ("triton", "torch"):
        monkeypatch.setattr(backend, "BACKEND", name)
        leaves = [
            leaf.requires_grad_(need)
            for leaf, need in zip(problem.requiring_grad(), needed, strict=True)
        ]
        options: Any = {"form": form, "weight": weight, "label_smoothing": 0.2}
        loss = separate_loss(leaves[0], problem.target, leaves[1], **options)
        assert uses_kernels(loss) == (name == "triton")
        inputs = [leaf for leaf in leaves if leaf.requires_grad]
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        norm = sum((one.square().sum() for one in first), torch.zeros(()))
        found.append([loss, *first, *torch.autograd.grad(norm, inputs)])
    torch.testing.assert_close(*found)


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


def test_a_retained_graph_gives_the_same_gradients_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the unit centers are read in blocks."""
    shrink_constants(monkeypatch)
    problem = random_problem(5, 3, 20)
    leaves = problem.requiring_grad()
    loss = separate_loss(leaves[0], problem.target, leaves[1])
    assert uses_kernels(loss)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), first, rtol=0, atol=0)


def test_the_loss_may_change_in_place() -> None:
    problem = random_problem(5, 3, 4)
    leaves = problem.requiring_grad()
    loss = separate_loss(leaves[0], problem.target, leaves[1])
    assert uses_kernels(loss)
    expected = torch.autograd.grad(loss * 2, leaves, retain_graph=True)
    loss *= 2
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), expected)


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


def test_graphs_with_centers_from_before_an_update_are_refused() -> None:
    """As after each change in place that autograd sees."""
    criterion = SeparateLoss(4, 3, center_init="sphere")
    problem = random_problem(5, 3, 4)
    features, _ = problem.requiring_grad()
    product = (features @ criterion.centers.mT).sum()
    criterion(features, problem.target)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_target_changed_in_place_before_backward_is_refused() -> None:
    problem = random_problem(5, 3, 4)
    features, centers = problem.requiring_grad()
    loss = separate_loss(features, problem.target, centers.detach())
    problem.target.fill_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("center_update", ["forward", "gradient"])
@pytest.mark.parametrize("form", ["simplex", "paper"])
def test_training_equals_that_by_operators(
    form: Any, center_update: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a head and its criterion, with class weights, label smoothing and ignored samples."""
    initial = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)).double().state_dict()
    problem = random_problem(5, 2, 4, torch.float64)
    problem.target[1] = -100
    outcomes = []
    for name in ("triton", "torch"):
        monkeypatch.setattr(backend, "BACKEND", name)
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)).double()
        model.load_state_dict(initial)
        criterion = SoftmaxSeparateLoss(
            model[1],
            form=form,
            center_update=center_update,
            center_init=torch.ones(4, 3).tril().double() if center_update == "gradient" else None,
            weight=torch.tensor([1.0, 2, 3, 4]).double(),
            label_smoothing=0.1,
        )
        parameters = {*model.parameters(), *criterion.parameters()}
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(3):
            loss = criterion(model(problem.features), problem.target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        outcomes.append([loss, *model.parameters(), criterion.separate.centers])
    torch.testing.assert_close(*outcomes)


def test_operators_run_what_kernels_do_not_support() -> None:
    problem = random_problem(4, 3, 5)
    features, target, centers = problem.features, problem.target, problem.centers
    leaf, _ = problem.requiring_grad()
    calls: list[tuple[Tensor, dict[str, Any]]] = [
        (torch.rand(4, 5), {}),
        (target, {"weight": torch.rand(5, requires_grad=True)}),
        (target, {"reduction": "sum"}),
        (target, {"reduction": "none"}),
    ]
    assert uses_kernels(separate_loss(leaf, target, centers))
    for one, options in calls:
        loss = separate_loss(leaf, one, centers, **options)
        assert not uses_kernels(loss)

    def loss_of(features: Tensor) -> Tensor:
        return separate_loss(features, target, centers, form="paper")

    (expected,) = torch.autograd.grad(loss_of(leaf), leaf)
    torch.testing.assert_close(grad(loss_of)(features), expected)
    slope = jvp(loss_of, (features,), (features,))[1]
    torch.testing.assert_close(slope, torch.zeros(()))
    batch = torch.stack([features, features * 2])
    torch.testing.assert_close(vmap(loss_of)(batch), loss_of(features).expand(2))
