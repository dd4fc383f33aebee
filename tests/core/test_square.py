"""The squared separation of the centers."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap

from separate_loss import SeparateLoss, _ops, separate_loss
from separate_loss.functional import inter_class_loss, update_centers
from tests.helpers import reference
from tests.helpers.properties import Problem, assert_equal, problems, property_test

seeds = st.integers(0, 2**32 - 1)
# The Gram matrix is (C, C) if C < d, else (d, d).
SHAPES = [(2, 1), (2, 5), (4, 4), (5, 4), (9, 2)]


def square(centers: Tensor) -> Tensor:
    return inter_class_loss(centers, separation="square")


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@property_test(problem=problems(), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_value_gradient_and_update_equal_the_reference(
    problem: Problem, dtype: torch.dtype
) -> None:
    problem = problem.to(dtype)
    x, probabilities, c = problem.arrays
    centers = problem.centers.clone().requires_grad_()
    value = square(centers)
    assert_equal(value, reference.square_separation(c), dtype)
    (gradient,) = torch.autograd.grad(value, centers)
    norms = problem.centers.double().norm(dim=-1, keepdim=True)
    expected = torch.from_numpy(2 * reference.square_separation_direction(c)) * norms
    assert_equal(gradient.double() * norms, expected.numpy(), dtype)
    for center_lr in (0.5, None):
        moved = update_centers(
            problem.features, problem.target, problem.centers,
            center_lr=center_lr, ignore_index=problem.ignore_index, separation="square",
        )  # fmt: skip
        rate = (
            reference.default_center_lr(probabilities, len(c)) if center_lr is None else center_lr
        )
        expected_centers = reference.update_centers(x, probabilities, c, center_lr, "square")
        if not probabilities.any():
            expected_centers = c - rate * reference.square_separation_direction(c)
        size = torch.where(norms > 0, norms.maximum(rate / norms), 1)
        scaled = torch.from_numpy(expected_centers) / size
        assert_equal(moved.double() / size, scaled.numpy(), dtype)


@property_test(problem=problems(max_exponent=3))
def test_value_is_within_its_bounds(problem: Problem) -> None:
    num_classes, dim = problem.centers.shape
    value = square(problem.centers)
    assert 0 <= value <= 1 + 1e-12
    if problem.centers.any(-1).all():
        assert value >= (num_classes - 1 - dim) / (num_classes * dim) - 1e-12


@property_test(num_classes=st.integers(2, 40), seed=seeds)
def test_value_is_0_at_the_simplex_and_1_for_equal_directions(num_classes: int, seed: int) -> None:
    torch.manual_seed(seed)
    simplex = torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes
    rotation, _ = torch.linalg.qr(doubles(num_classes, num_classes))
    torch.testing.assert_close(square(simplex @ rotation).item(), 0.0, atol=1e-12, rtol=0)
    same = doubles(1, 8) * torch.rand(num_classes, 1).double().add(0.1)
    torch.testing.assert_close(square(same).item(), 1.0)
    if num_classes > 3 and num_classes % 2 == 0:
        # These sum to zero and so minimise Eq. 3.
        halves = doubles(num_classes // 2, num_classes)
        assert square(torch.cat([halves, -halves])) > 1e-3


@property_test(problem=problems(max_exponent=3), seed=seeds)
def test_positive_factors_rotations_and_permutations_change_nothing(
    problem: Problem, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    centers = problem.centers
    rotation, _ = torch.linalg.qr(doubles(centers.shape[1], centers.shape[1]))
    factors = torch.from_numpy(10 ** rng.uniform(-6, 6, size=(len(centers), 1)))
    order = torch.from_numpy(rng.permutation(len(centers)))
    expected = square(centers)
    for other in (centers * factors, centers @ rotation, centers[order]):
        torch.testing.assert_close(square(other), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_first_and_second_derivatives(shape: tuple[int, int]) -> None:
    centers = doubles(*shape).requires_grad_()
    # A zero center is in no pair.
    zero = doubles(1, shape[1]) * 0

    def value(centers: Tensor) -> Tensor:
        return square(torch.cat([centers[:1], zero, centers[1:]]))

    assert gradcheck(
        value, centers,
        check_forward_ad=True, check_batched_forward_grad=True, check_batched_grad=True,
    )  # fmt: skip
    assert gradgradcheck(value, centers, check_fwd_over_rev=True)
    assert gradcheck(square, centers)
    assert gradgradcheck(square, centers)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("shape", SHAPES)
def test_first_and_second_derivatives_of_the_loss(shape: tuple[int, int], kind: str) -> None:
    features, centers = doubles(3, shape[1]).requires_grad_(), doubles(*shape).requires_grad_()
    target = torch.arange(3) % shape[0]
    if kind == "probabilities":
        target = doubles(3, shape[0]).softmax(-1)

    def loss(features: Tensor, centers: Tensor) -> Tensor:
        return separate_loss(features, target, centers, separation="square")

    assert gradcheck(loss, (features, centers), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(loss, (features, centers))


@pytest.mark.parametrize("shape", [(7, 64), (64, 7)])
@pytest.mark.parametrize("center_update", ["forward", "gradient"])
def test_compiled_modules_equal_uncompiled_ones(shape: tuple[int, int], center_update: Any) -> None:
    """test_compile.py has class probabilities."""
    torch._dynamo.reset()
    plain = SeparateLoss(*shape, center_update=center_update, separation="square")
    twin = copy.deepcopy(plain)
    fast = torch.compile(twin)
    for _ in range(2):
        features, target = torch.randn(8, shape[1]), torch.randint(shape[0], (8,))
        results = []
        for criterion, call in ((plain, plain), (twin, fast)):
            leaf = features.clone().requires_grad_()
            loss = call(leaf, target)
            loss.backward()
            results.append((loss, leaf.grad, criterion.centers.clone(), criterion.centers.grad))
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


def test_autocast_changes_nothing() -> None:
    for shape in ((7, 16), (16, 7)):
        centers = torch.randn(*shape, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            value = square(centers)
            moved = update_centers(
                torch.randn(4, shape[1]), torch.zeros(4, dtype=torch.int64), centers,
                center_lr=1.0, separation="square",
            )  # fmt: skip
        assert value.dtype == moved.dtype == torch.float32
        torch.testing.assert_close(value, square(centers), rtol=1e-6, atol=1e-7)


def test_vmap_equals_a_loop() -> None:
    centers = torch.randn(3, 6, 4)
    torch.testing.assert_close(vmap(square)(centers), torch.stack([square(one) for one in centers]))


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_blocks_of_rows_change_nothing(
    shape: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = torch.randn(8, shape[1])
    target = torch.randint(shape[0], (8,))
    if kind == "probabilities":
        target = torch.rand(8, shape[0]).softmax(-1)
    results = []
    for block in (2**20, 32):
        monkeypatch.setattr(_ops, "BLOCK_SIZE", block)
        centers = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        leaf = centers.clone().requires_grad_()
        value = square(leaf)
        value.backward()
        moved = update_centers(features, target, centers, center_lr=2.0, separation="square")
        results.append((value, leaf.grad, moved))
    torch.testing.assert_close(*results)


def test_no_memory_for_all_pairs_of_centers() -> None:
    """All pairs of 4,000 classes would take 64 MB."""
    criterion = SeparateLoss(4000, 8, separation="square", center_init="sphere")
    features, target = torch.randn(32, 8, requires_grad=True), torch.randint(4000, (32,))
    with torch.profiler.profile(profile_memory=True) as profile:
        criterion(features, target).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 2**20


def test_close_centers_that_sum_to_zero_move_apart() -> None:
    """Eq. 3 is at its minimum for two pairs of opposite centers, even if the pairs are close."""
    start = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])
    start = torch.cat([start, torch.zeros(4, 2)], dim=1) + 1e-3 * torch.randn(4, 4)
    closest = {}
    for separation in ("mean", "square"):
        criterion: Any = SeparateLoss(
            4,
            4,
            center_init=start,
            separation=separation,
            center_lr=2.0,
        )
        ignored = torch.full((1,), -100)
        for _ in range(500):
            criterion(torch.randn(1, 4, requires_grad=True), ignored)
        units = torch.nn.functional.normalize(criterion.centers, dim=-1)
        closest[separation] = (units @ units.T - 2 * torch.eye(4)).max()
    assert closest["mean"] > 0.9
    assert closest["square"] < -0.3


@pytest.mark.parametrize("value", ["squares", None, 2])
def test_unknown_separations_are_refused(value: Any) -> None:
    vectors, target = torch.randn(3, 4), torch.arange(3)
    for call in (
        lambda: inter_class_loss(vectors, separation=value),
        lambda: separate_loss(vectors, target, vectors, separation=value),
        lambda: update_centers(vectors, target, vectors, center_lr=1.0, separation=value),
        lambda: SeparateLoss(3, 4, separation=value),
    ):
        with pytest.raises(ValueError, match="separation must be one of 'mean', 'square', got"):
            call()
