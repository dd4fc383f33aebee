"""The simplex form: a pull that does not depend on the norm, and centers pushed to a simplex."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jvp, vmap

from separate_loss import SeparateLoss, SoftmaxSeparateLoss, _ops, separate_loss
from separate_loss.functional import inter_class_loss, intra_class_loss, update_centers
from tests.helpers import reference
from tests.helpers.properties import REDUCTIONS, Problem, assert_equal, problems, property_test

FUNCTIONS = st.sampled_from([separate_loss, intra_class_loss])
DTYPES = st.sampled_from([torch.float64, torch.float32])
seeds = st.integers(0, 2**32 - 1)
# The Gram matrix is (C, C) if C < d, else (d, d).
SHAPES = [(2, 1), (2, 5), (4, 4), (5, 4), (9, 2)]


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def options_of(problem: Problem) -> dict[str, Any]:
    return {"weight": problem.weight, "ignore_index": problem.ignore_index}


@property_test(problem=problems(), dtype=DTYPES)
def test_loss_gradient_and_update_equal_the_reference(problem: Problem, dtype: torch.dtype) -> None:
    problem = problem.to(dtype)
    x, probabilities, c = problem.arrays
    loss = separate_loss(problem.features, problem.target, problem.centers, **options_of(problem))
    expected = reference.separate_loss(x, probabilities, c, problem.weights, "mean", "simplex")
    assert_equal(loss, expected, dtype)
    centers = problem.centers.clone().requires_grad_()
    value = inter_class_loss(centers)
    assert_equal(value, reference.simplex_loss(c), dtype)
    gradient = torch.zeros_like(centers)
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value, centers)
    norms = problem.centers.double().norm(dim=-1, keepdim=True)
    of_inter = torch.from_numpy(2 * reference.simplex_direction(c)) * norms
    assert_equal(gradient.double() * norms, of_inter.numpy(), dtype)
    for center_lr in (0.5, None):
        moved = update_centers(
            problem.features, problem.target, problem.centers,
            center_lr=center_lr, ignore_index=problem.ignore_index,
        )  # fmt: skip
        rate = center_lr
        if rate is None:
            rate = reference.default_center_lr(probabilities, c, "simplex")
        expected_centers = reference.update_centers(x, probabilities, c, center_lr, "simplex")
        if not probabilities.any():
            expected_centers = c - rate * reference.simplex_direction(c)
        size = torch.where(norms > 0, norms.maximum(rate / norms), 1)
        scaled = torch.from_numpy(expected_centers) / size
        assert_equal(moved.double() / size, scaled.numpy(), dtype)


def results_of(
    criterion: SeparateLoss, batches: list[tuple[Tensor, Tensor]], seen: list[int]
) -> list[Tensor]:
    """Losses and gradients of training steps, and the centers of the classes seen."""
    results = []
    for features, target in batches:
        leaf = features.clone().requires_grad_()
        loss = criterion(leaf, target)
        results += [loss.detach(), *torch.autograd.grad(loss, leaf)]
        assert criterion.last_terms is not None
        results += [term.double() for term in criterion.last_terms]
    return [*results, criterion.centers.detach()[seen]]


@property_test(
    num_classes=st.integers(3, 40), num_seen=st.integers(2, 8), dim=st.integers(1, 12),
    kind=st.sampled_from(["indices", "probabilities"]), weighted=st.booleans(),
    center_lr=st.sampled_from([None, 0.5]), seed=seeds,
)  # fmt: skip
def test_classes_without_a_center_do_not_count(
    num_classes: int, num_seen: int, dim: int, kind: str, weighted: bool,
    center_lr: float | None, seed: int,
) -> None:  # fmt: skip
    """A loss of C classes of which k occur equals a loss of these k alone."""
    torch.manual_seed(seed)
    num_seen = min(num_seen, num_classes)
    seen = torch.randperm(num_classes)[:num_seen].sort().values
    weight = torch.rand(num_classes, dtype=torch.float64) if weighted else None
    own_weight = None if weight is None else weight[seen]
    many = SeparateLoss(num_classes, dim, center_lr=center_lr, weight=weight, dtype=torch.float64)
    few = SeparateLoss(num_seen, dim, center_lr=center_lr, weight=own_weight, dtype=torch.float64)
    of_many, of_few = [], []
    for _ in range(3):
        features, index = doubles(9, dim), torch.randint(num_seen, (9,))
        if kind == "indices":
            of_many.append((features, seen[index]))
            of_few.append((features, index))
        else:
            probabilities = doubles(9, num_seen).softmax(-1)
            spread = torch.zeros(9, num_classes, dtype=torch.float64)
            of_many.append((features, spread.index_copy(1, seen, probabilities)))
            of_few.append((features, probabilities))
    found = results_of(many, of_many, seen.tolist())
    expected = results_of(few, of_few, list(range(num_seen)))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    unseen = [label for label in range(num_classes) if label not in seen]
    assert not many.centers[unseen].any()


def test_ten_of_a_thousand_classes_are_kept_apart() -> None:
    directions = torch.nn.functional.normalize(torch.ones(16) + 0.5 * torch.randn(10, 16), dim=1)
    criterion = SeparateLoss(1000, 16)
    features = torch.nn.Parameter(directions.repeat(4, 1))
    optimizer = torch.optim.SGD([features], 1.0)
    for _ in range(300):
        optimizer.zero_grad()
        criterion(features, torch.arange(10).repeat(4)).backward()
        optimizer.step()
    units = torch.nn.functional.normalize(features.detach()[:10], dim=1)
    assert (units @ units.T - torch.eye(10)).max() < 0.1
    assert criterion.last_terms is not None
    assert criterion.last_terms.num_centers == 10


@pytest.mark.parametrize("num_centers", [0, 1])
def test_fewer_than_two_centers_have_no_loss_and_no_push(num_centers: int) -> None:
    centers = torch.zeros(4, 3)
    centers[:num_centers] = torch.randn(3)
    leaf = centers.clone().requires_grad_()
    value = inter_class_loss(leaf)
    assert value == 0
    value.backward()
    assert leaf.grad is not None
    assert not leaf.grad.any()
    nothing = torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)
    assert torch.equal(update_centers(*nothing, centers, center_lr=1.0), centers)


@property_test(problem=problems(max_exponent=3))
def test_inter_class_loss_is_within_its_bounds(problem: Problem) -> None:
    num_classes, dim = problem.centers.shape
    value = inter_class_loss(problem.centers)
    assert 0 <= value <= 1 + 1e-12
    if problem.centers.any(-1).all():
        assert value >= (num_classes - 1 - dim) / (num_classes * dim) - 1e-12


@property_test(num_classes=st.integers(2, 40), seed=seeds)
def test_inter_class_loss_is_0_at_the_simplex_and_1_for_equal_directions(
    num_classes: int, seed: int
) -> None:
    torch.manual_seed(seed)
    simplex = torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes
    rotation, _ = torch.linalg.qr(doubles(num_classes, num_classes))
    value = inter_class_loss(simplex @ rotation)
    torch.testing.assert_close(value.item(), 0.0, atol=1e-12, rtol=0)
    same = doubles(1, 8) * torch.rand(num_classes, 1).double().add(0.1)
    torch.testing.assert_close(inter_class_loss(same).item(), 1.0)
    if num_classes > 3 and num_classes % 2 == 0:
        # These sum to zero and so minimise Eq. 3.
        halves = doubles(num_classes // 2, num_classes)
        assert inter_class_loss(torch.cat([halves, -halves])) > 1e-3


@property_test(problem=problems(max_exponent=3))
def test_the_gradient_is_eq_5_times_the_norm(problem: Problem) -> None:
    features, centers = problem.requiring_grad()
    loss = separate_loss(features, problem.target, centers, **options_of(problem))
    of_features, _ = torch.autograd.grad(loss, (features, centers))
    x, probabilities, c = problem.arrays
    expected = reference.features_gradient(x, probabilities, c, problem.weights)
    if not probabilities.any():
        expected[:] = 0
    norms = problem.features.norm(dim=-1, keepdim=True).numpy()
    assert_equal(of_features, expected * norms, torch.float64)


@property_test(problem=problems(max_exponent=3), reduction=REDUCTIONS)
def test_l_intra_and_its_gradient_of_centers_are_those_of_the_paper(
    problem: Problem, reduction: Any
) -> None:
    results = []
    for form in ("simplex", "paper"):
        features, centers = problem.requiring_grad()
        loss = intra_class_loss(
            features, problem.target, centers,
            form=form, reduction=reduction, **options_of(problem),
        )  # fmt: skip
        results.append((loss, torch.autograd.grad(loss.sum(), centers)[0]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@property_test(problem=problems(max_exponent=1), dtype=DTYPES, seed=seeds)
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
        loss = separate_loss(features, problem.target, problem.centers, **options_of(problem))
        gradients.append(torch.autograd.grad(loss, features)[0])
    assert_equal(gradients[1], gradients[0].double().numpy(), dtype)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_zero_and_ignored_samples_have_no_gradient(value: float) -> None:
    features = torch.randn(3, 4)
    features[1] = value
    features.requires_grad_()
    target = torch.tensor([0, -100 if value else 1, 2])
    separate_loss(features, target, torch.randn(3, 4)).backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    assert features.grad.any(-1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_do_not_underflow(dtype: torch.dtype) -> None:
    """Eq. 5 underflows in float16 for features of this norm."""
    features = (torch.randn(2000, 4) * 1e4).to(dtype).requires_grad_()
    target, centers = torch.arange(2000) % 3, torch.randn(3, 4)
    separate_loss(features, target, centers).backward()
    wide = features.detach().float().requires_grad_()
    separate_loss(wide, target, centers).backward()
    assert features.grad is not None
    assert wide.grad is not None
    assert features.grad.dtype == dtype
    torch.testing.assert_close(features.grad, wide.grad.to(dtype))


@pytest.mark.parametrize("kind", ["indices", "smoothed", "probabilities"])
def test_derivatives_equal_those_of_a_surrogate(kind: str) -> None:
    """The loss at x + ||x|| (v - x), in v, with x and ||x|| held constant."""
    features, centers = doubles(4, 3), doubles(5, 3)
    target: Tensor = torch.tensor([0, 1, 1, 4])
    if kind == "probabilities":
        target = torch.rand(4, 5, dtype=torch.float64).softmax(-1)
    smoothing = 0.1 if kind == "smoothed" else 0.0
    norms = features.norm(dim=-1, keepdim=True)

    def surrogate(value: Tensor) -> Tensor:
        pulled = features + norms * (value - features)
        return separate_loss(
            pulled, target, centers, form="paper", label_smoothing=smoothing
        ) + inter_class_loss(centers)

    def loss(value: Tensor) -> Tensor:
        return separate_loss(value, target, centers, label_smoothing=smoothing) + inter_class_loss(
            centers, form="paper"
        )

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


@pytest.mark.parametrize("shape", SHAPES)
def test_first_and_second_derivatives_of_inter_class_loss(shape: tuple[int, int]) -> None:
    centers = doubles(*shape).requires_grad_()
    # A zero center is in no pair.
    zero = doubles(1, shape[1]) * 0

    def value(centers: Tensor) -> Tensor:
        return inter_class_loss(torch.cat([centers[:1], zero, centers[1:]]))

    assert gradcheck(
        value, centers,
        check_forward_ad=True, check_batched_forward_grad=True, check_batched_grad=True,
    )  # fmt: skip
    assert gradgradcheck(value, centers, check_fwd_over_rev=True)
    assert gradcheck(inter_class_loss, centers)
    assert gradgradcheck(inter_class_loss, centers)


@pytest.mark.parametrize("kind", ["indices", "smoothed", "probabilities"])
@pytest.mark.parametrize("shape", SHAPES)
def test_first_and_second_derivatives_for_centers(shape: tuple[int, int], kind: str) -> None:
    features, centers = doubles(3, shape[1]), doubles(*shape).requires_grad_()
    target = torch.arange(3) % shape[0]
    if kind == "probabilities":
        target = doubles(3, shape[0]).softmax(-1)
    smoothing = 0.1 if kind == "smoothed" else 0.0

    def loss(centers: Tensor) -> Tensor:
        return separate_loss(features, target, centers, label_smoothing=smoothing)

    assert gradcheck(loss, centers, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(loss, centers)


@pytest.mark.parametrize("shape", [(7, 64), (64, 7)])
@pytest.mark.parametrize("center_update", ["forward", "gradient"])
def test_compiled_modules_equal_uncompiled_ones(shape: tuple[int, int], center_update: Any) -> None:
    """test_compile.py has class probabilities."""
    plain = SeparateLoss(*shape, center_update=center_update)
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
            value = inter_class_loss(centers)
            moved = update_centers(
                torch.randn(4, shape[1]), torch.zeros(4, dtype=torch.int64), centers, center_lr=1.0
            )
        assert value.dtype == moved.dtype == torch.float32
        torch.testing.assert_close(value, inter_class_loss(centers), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num_zeros", [0, 2, 5])
def test_vmap_equals_a_loop(num_zeros: int) -> None:
    centers = torch.randn(3, 6, 4)
    centers[1, :num_zeros] = 0
    each = torch.stack([inter_class_loss(one) for one in centers])
    torch.testing.assert_close(vmap(inter_class_loss)(centers), each)


def test_vmap_over_an_ensemble_equals_a_loop() -> None:
    criterion = SeparateLoss(3, 4, center_update="gradient")
    features, target = torch.randn(2, 5, 4), torch.tensor([0, 1, 2, 0, 1])
    centers = torch.randn(2, 3, 4)

    def loss(features: Tensor, centers: Tensor) -> Tensor:
        result: Tensor = functional_call(criterion, {"centers": centers}, (features, target))
        return result

    together = vmap(grad(loss))(features, centers)
    for i in range(2):
        torch.testing.assert_close(together[i], grad(loss)(features[i], centers[i]))


def test_the_joint_loss_scales_its_separate_part_only() -> None:
    head = torch.nn.Linear(4, 3)
    centers = torch.randn(3, 4)
    features, target = torch.randn(5, 4) * 20, torch.tensor([0, 1, 2, 0, 1])
    gradients = []
    for form in ("paper", "simplex"):
        criterion = SoftmaxSeparateLoss(head, center_init=centers, form=form)
        leaf = features.clone().requires_grad_()
        softmax = torch.nn.functional.cross_entropy(head(leaf), target)
        (alone,) = torch.autograd.grad(softmax, leaf)
        gradients.append(torch.autograd.grad(criterion(head(leaf), target), leaf)[0] - alone)
    torch.testing.assert_close(
        gradients[0] * features.norm(dim=-1, keepdim=True), gradients[1], rtol=1e-3, atol=1e-6
    )


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
        value = inter_class_loss(leaf)
        value.backward()
        moved = update_centers(features, target, centers, center_lr=2.0)
        results.append((value, leaf.grad, moved))
    torch.testing.assert_close(*results)


def test_no_memory_for_all_pairs_of_centers() -> None:
    """All pairs of 4,000 classes would take 64 MB."""
    criterion = SeparateLoss(4000, 8, center_init="sphere")
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
    for form in ("paper", "simplex"):
        criterion = SeparateLoss(4, 4, center_init=start, form=form, center_lr=2.0)
        ignored = torch.full((1,), -100)
        for _ in range(500):
            criterion(torch.randn(1, 4, requires_grad=True), ignored)
        units = torch.nn.functional.normalize(criterion.centers, dim=-1)
        closest[form] = (units @ units.T - 2 * torch.eye(4)).max()
    assert closest["paper"] > 0.9
    assert closest["simplex"] < -0.3


@pytest.mark.parametrize("value", ["square", None, 2])
def test_unknown_forms_are_refused(value: Any) -> None:
    vectors, target = torch.randn(3, 4), torch.arange(3)
    for call in (
        lambda: inter_class_loss(vectors, form=value),
        lambda: intra_class_loss(vectors, target, vectors, form=value),
        lambda: separate_loss(vectors, target, vectors, form=value),
        lambda: update_centers(vectors, target, vectors, form=value),
        lambda: SeparateLoss(3, 4, form=value),
    ):
        with pytest.raises(ValueError, match="form must be one of 'simplex', 'paper', got"):
            call()
