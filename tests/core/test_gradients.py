"""First and second derivatives of the paper's form: backward, forward mode, and torch.func."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from separate_loss import SeparateLoss
from separate_loss import functional as F
from separate_loss._checks import Reduction

separate_loss = partial(F.separate_loss, form="paper")
intra_class_loss = partial(F.intra_class_loss, form="paper")
inter_class_loss = partial(F.inter_class_loss, form="paper")
TargetKind = Literal["indices", "ignoring", "probabilities"]

NUM_SAMPLES, NUM_CLASSES, FEATURE_DIM = 4, 4, 3


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def features() -> Tensor:
    return doubles(NUM_SAMPLES, FEATURE_DIM).requires_grad_()


@pytest.fixture
def centers() -> Tensor:
    return doubles(NUM_CLASSES, FEATURE_DIM).requires_grad_()


def target_of(kind: TargetKind) -> Tensor:
    if kind == "probabilities":
        return doubles(NUM_SAMPLES, NUM_CLASSES).softmax(-1)
    target = torch.tensor([0, 0, 1, 2])
    if kind == "ignoring":
        target[1] = -100
    return target


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["indices", "ignoring", "probabilities"])
@pytest.mark.parametrize("function", [separate_loss, intra_class_loss])
def test_first_and_second_derivatives(
    function: Callable[..., Tensor],
    kind: TargetKind,
    weighted: bool,
    reduction: Reduction,
    features: Tensor,
    centers: Tensor,
) -> None:
    weight = torch.rand(NUM_CLASSES, dtype=torch.float64) if weighted else None
    target = target_of(kind)

    def loss(features: Tensor, centers: Tensor) -> Tensor:
        return function(features, target, centers, weight=weight, reduction=reduction)

    assert gradcheck(
        loss,
        (features, centers),
        check_forward_ad=True,
        check_batched_forward_grad=True,
        check_batched_grad=True,
    )
    assert gradgradcheck(loss, (features, centers), check_fwd_over_rev=True)


def test_first_and_second_derivatives_of_similarity_and_inter_class_loss(
    features: Tensor, centers: Tensor
) -> None:
    cases: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (F.similarity, (features, centers[:1])),
        (inter_class_loss, (centers,)),
    ]
    for function, arguments in cases:
        assert gradcheck(function, arguments, check_forward_ad=True)
        assert gradgradcheck(function, arguments, check_fwd_over_rev=True)


def test_first_and_second_derivatives_for_class_probabilities(
    features: Tensor, centers: Tensor
) -> None:
    target = target_of("probabilities").requires_grad_()
    weight = torch.rand(NUM_CLASSES, dtype=torch.float64)

    def loss(target: Tensor) -> Tensor:
        return separate_loss(features, target, centers, weight=weight)

    assert gradcheck(loss, target)
    assert gradgradcheck(loss, target)


def test_derivatives_are_not_clamped_at_the_bounds_of_cosines() -> None:
    """The value is clamped to its bounds; the derivatives must be those without the clamp."""
    centers = doubles(40, 3)
    features = (centers * torch.linspace(-2, 2, 40).unsqueeze(-1)).requires_grad_()
    target = torch.arange(40)
    units = torch.nn.functional.normalize(features.detach(), dim=-1)
    cosines = (units * torch.nn.functional.normalize(centers, dim=-1)).sum(-1)
    assert (cosines.abs() > 1).any(), "no cosine exceeds its bounds"

    def loss(features: Tensor) -> Tensor:
        return separate_loss(features, target, centers)

    assert gradcheck(loss, features)
    assert gradgradcheck(loss, features)


@pytest.mark.parametrize("kind", ["indices", "ignoring", "probabilities"])
def test_func_transforms_agree_with_autograd(
    kind: TargetKind, features: Tensor, centers: Tensor
) -> None:
    target = target_of(kind)

    def loss(features: Tensor, centers: Tensor) -> Tensor:
        return separate_loss(features, target, centers)

    expected = torch.autograd.grad(loss(features, centers), (features, centers))
    arguments = features.detach(), centers.detach()
    for transform in (grad, jacrev, jacfwd):
        torch.testing.assert_close(transform(loss, argnums=(0, 1))(*arguments), expected)
    slope = jvp(loss, arguments, arguments)[1]
    # The loss is independent of all norms, so its derivative along its arguments is zero.
    torch.testing.assert_close(slope, torch.zeros_like(slope))
    forward_over_reverse = hessian(loss, argnums=(0, 1))(*arguments)
    reverse_over_reverse = jacrev(jacrev(loss, argnums=(0, 1)), argnums=(0, 1))(*arguments)
    torch.testing.assert_close(forward_over_reverse, reverse_over_reverse)


@pytest.mark.parametrize("kind", ["indices", "ignoring", "probabilities"])
def test_per_sample_gradients_by_vmap_equal_a_loop(
    kind: TargetKind, features: Tensor, centers: Tensor
) -> None:
    target = target_of(kind)

    def loss(sample: Tensor, label: Tensor, centers: Tensor) -> Tensor:
        return separate_loss(sample, label, centers, reduction="sum")

    per_sample = vmap(grad(loss, argnums=(0, 2)), in_dims=(0, 0, None))
    arguments = features.detach(), target, centers.detach()
    of_features, of_centers = per_sample(*arguments)
    for i in range(NUM_SAMPLES):
        one = grad(loss, argnums=(0, 2))(features.detach()[i], target[i], centers.detach())
        torch.testing.assert_close((of_features[i], of_centers[i]), one)


# An in-place operator of the update has no batching rule.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_problems_equals_a_loop() -> None:
    features, centers = doubles(3, NUM_SAMPLES, FEATURE_DIM), doubles(3, NUM_CLASSES, FEATURE_DIM)
    target = torch.randint(NUM_CLASSES, (3, NUM_SAMPLES))

    def updated(features: Tensor, target: Tensor, centers: Tensor) -> Tensor:
        return F.update_centers(features, target, centers, center_lr=1.0)

    for function in (separate_loss, updated):
        result = vmap(function)(features, target, centers)
        one_by_one = [function(*problem) for problem in zip(features, target, centers, strict=True)]
        torch.testing.assert_close(result, torch.stack(one_by_one))


def test_functional_call_of_the_module_equals_the_function(
    features: Tensor, centers: Tensor
) -> None:
    criterion = SeparateLoss(
        NUM_CLASSES, FEATURE_DIM, form="paper", center_update="gradient", dtype=torch.float64
    )
    target = target_of("indices")
    loss = functional_call(criterion, {"centers": centers}, (features, target))
    assert torch.equal(loss, separate_loss(features, target, centers))


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_zero_vectors_have_finite_derivatives(kind: TargetKind) -> None:
    features, centers = doubles(NUM_SAMPLES, FEATURE_DIM), doubles(NUM_CLASSES, FEATURE_DIM)
    features[0] = centers[1] = 0
    features.requires_grad_()
    centers.requires_grad_()
    loss = separate_loss(features, target_of(kind), centers)
    first = torch.autograd.grad(loss, (features, centers), create_graph=True)
    squared = first[0].square().sum() + first[1].square().sum()
    second = torch.autograd.grad(squared, (features, centers))
    for part, zero_row in zip((*first, *second), (0, 1, 0, 1), strict=True):
        assert part.isfinite().all()
        assert torch.equal(part[zero_row], torch.zeros(FEATURE_DIM, dtype=torch.float64))


def test_gradients_of_both_terms_add_up(features: Tensor, centers: Tensor) -> None:
    target = target_of("indices")
    (whole,) = torch.autograd.grad(separate_loss(features, target, centers), centers)
    (intra,) = torch.autograd.grad(intra_class_loss(features, target, centers), centers)
    (inter,) = torch.autograd.grad(inter_class_loss(centers), centers)
    torch.testing.assert_close(whole, intra + inter)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients_of_several_blocks_of_centers() -> None:
    features, target = torch.randn(3, 256, requires_grad=True), torch.arange(3)
    centers = torch.randn(4100, 256, requires_grad=True)
    loss = separate_loss(features, target, centers)
    (expected,) = torch.autograd.grad(loss, centers, retain_graph=True)
    (batched,) = torch.autograd.grad(loss, centers, torch.tensor([1.0, 2.0]), is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack([expected, expected * 2]))


@pytest.mark.parametrize("num_classes", [NUM_CLASSES, 9])
@pytest.mark.parametrize("changed", ["features", "target", "centers", "weight"])
def test_arguments_changed_in_place_before_backward_are_refused(
    changed: str, num_classes: int
) -> None:
    given: dict[str, Any] = {
        "features": doubles(NUM_SAMPLES, FEATURE_DIM),
        "target": target_of("indices"),
        "centers": doubles(num_classes, FEATURE_DIM),
        "weight": torch.rand(num_classes, dtype=torch.float64),
    }
    given["features"].requires_grad_()
    given["centers"].requires_grad_()
    loss = separate_loss(**given)
    with torch.no_grad():
        given[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
