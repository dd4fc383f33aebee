"""Properties of the loss for all batches and centers."""

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from separate_loss import functional as F
from separate_loss import separate_loss
from tests.helpers.properties import REDUCTIONS, Problem, problems, property_test

seeds = st.integers(0, 2**32 - 1)


FORMS = st.sampled_from(["simplex", "paper"])


def loss_of(problem: Problem, reduction: str = "mean", form: str = "simplex") -> Tensor:
    return separate_loss(
        problem.features,
        problem.target,
        problem.centers,
        form=form,  # type: ignore[arg-type]
        weight=problem.weight,
        ignore_index=problem.ignore_index,
        reduction=reduction,  # type: ignore[arg-type]
    )


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def replace(problem: Problem, **changes: Tensor) -> Problem:
    return Problem(**(vars(problem) | changes))


@property_test(problem=problems(), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_both_terms_are_within_their_bounds(problem: Problem, dtype: torch.dtype) -> None:
    problem = problem.to(dtype)
    intra = F.intra_class_loss(
        problem.features, problem.target, problem.centers, ignore_index=problem.ignore_index
    )
    inter = F.inter_class_loss(problem.centers, form="paper")
    num_classes = len(problem.centers)
    rounding = 4 * torch.finfo(dtype).eps
    assert 0 <= intra <= 1 + rounding
    least = (num_classes - 2) / (2 * (num_classes - 1))
    if (problem.centers != 0).any(-1).all():
        assert least - rounding <= inter <= 1 + rounding
    else:
        assert 0 <= inter <= 1 + rounding


@property_test(num_classes=st.integers(2, 40), seed=seeds)
def test_inter_class_loss_is_minimal_if_unit_centers_sum_to_zero(
    num_classes: int, seed: int
) -> None:
    torch.manual_seed(seed)
    simplex = torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes
    rotation, _ = torch.linalg.qr(torch.randn(num_classes, num_classes, dtype=torch.float64))
    least = torch.tensor((num_classes - 2) / (2 * (num_classes - 1)), dtype=torch.float64)
    assert_same(F.inter_class_loss(simplex @ rotation, form="paper"), least)
    if num_classes % 2 == 0:
        # Opposite pairs sum to zero as well.
        halves = torch.randn(num_classes // 2, 3, dtype=torch.float64)
        assert_same(F.inter_class_loss(torch.cat([halves, -halves]), form="paper"), least)


@property_test(num_classes=st.integers(2, 40), seed=seeds)
def test_inter_class_loss_is_1_for_centers_of_one_direction(num_classes: int, seed: int) -> None:
    torch.manual_seed(seed)
    centers = torch.randn(1, 8, dtype=torch.float64) * torch.rand(num_classes, 1).double().add(0.1)
    assert_same(F.inter_class_loss(centers), torch.ones((), dtype=torch.float64))


@property_test(problem=problems(max_exponent=3), reduction=REDUCTIONS, form=FORMS, seed=seeds)
def test_positive_factors_change_nothing(
    problem: Problem, reduction: str, form: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    factors = [
        torch.from_numpy(10 ** rng.uniform(-6, 6, size=(len(vectors), 1)))
        for vectors in (problem.features, problem.centers)
    ]
    scaled = replace(
        problem,
        features=problem.features * factors[0],
        centers=problem.centers * factors[1],
    )
    assert_same(loss_of(scaled, reduction, form), loss_of(problem, reduction, form))


@property_test(problem=problems(max_exponent=3), reduction=REDUCTIONS, form=FORMS, seed=seeds)
def test_a_rotation_changes_nothing(problem: Problem, reduction: str, form: str, seed: int) -> None:
    torch.manual_seed(seed)
    dim = problem.features.shape[1]
    rotation, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))
    rotated = replace(
        problem, features=problem.features @ rotation, centers=problem.centers @ rotation
    )
    assert_same(loss_of(rotated, reduction, form), loss_of(problem, reduction, form))
    arguments = {"form": form, "center_lr": 0.5, "ignore_index": problem.ignore_index}
    moved = F.update_centers(problem.features, problem.target, problem.centers, **arguments)  # type: ignore[arg-type]
    turned = F.update_centers(rotated.features, problem.target, rotated.centers, **arguments)  # type: ignore[arg-type]
    size = moved.abs().max().clamp(min=1)
    assert_same(turned / size, (moved @ rotation) / size)


@property_test(problem=problems(max_exponent=3), seed=seeds)
def test_the_order_of_samples_changes_nothing(problem: Problem, seed: int) -> None:
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(problem.features)))
    shuffled = replace(problem, features=problem.features[order], target=problem.target[order])
    assert_same(loss_of(shuffled), loss_of(problem))
    assert_same(loss_of(shuffled, "none"), loss_of(problem, "none")[order])


@property_test(problem=problems(max_exponent=3), reduction=REDUCTIONS, form=FORMS, seed=seeds)
def test_a_permutation_of_classes_changes_nothing(
    problem: Problem, reduction: str, form: str, seed: int
) -> None:
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(problem.centers)))
    inverse = order.argsort()
    changes = {"centers": problem.centers[order]}
    if problem.weight is not None:
        changes["weight"] = problem.weight[order]
    if problem.target.is_floating_point():
        changes["target"] = problem.target[:, order]
    else:
        assume(problem.ignore_index == -100)
        kept = problem.target >= 0
        changes["target"] = torch.where(kept, inverse[problem.target * kept], -100)
    permuted = loss_of(replace(problem, **changes), reduction, form)
    assert_same(permuted, loss_of(problem, reduction, form))


@property_test(problem=problems(max_exponent=3), times=st.integers(2, 4))
def test_a_repeated_batch_changes_nothing(problem: Problem, times: int) -> None:
    repeated = replace(
        problem,
        features=problem.features.repeat(times, 1),
        target=problem.target.repeat(times, *[1] * (problem.target.ndim - 1)),
    )
    assert_same(loss_of(repeated), loss_of(problem))


@property_test(problem=problems(max_exponent=2), form=FORMS)
def test_gradients_are_orthogonal_to_their_vectors(problem: Problem, form: str) -> None:
    features, centers = problem.requiring_grad()
    loss_of(replace(problem, features=features, centers=centers), form=form).backward()
    for vectors in (features, centers):
        assert vectors.grad is not None
        along = (vectors.detach() * vectors.grad).sum(-1)
        assert_same(along, torch.zeros_like(along))


@property_test(problem=problems())
def test_none_mean_and_sum_agree(problem: Problem) -> None:
    each, mean, total = (loss_of(problem, reduction) for reduction in ("none", "mean", "sum"))
    assert_same(each.sum(), total)
    _, probabilities, _ = problem.arrays
    total_weight = float((probabilities @ problem.weights).sum())
    if total_weight > 0:
        assert_same(total / total_weight, mean)
    if problem.weight is None and total_weight == len(each):
        assert_same(each.mean(), mean)


@property_test(problem=problems(kind="indices"), reduction=REDUCTIONS, form=FORMS)
def test_one_hot_probabilities_equal_the_class_index(
    problem: Problem, reduction: str, form: str
) -> None:
    _, probabilities, _ = problem.arrays
    one_hot = replace(problem, target=torch.from_numpy(probabilities))
    assert_same(loss_of(one_hot, reduction, form), loss_of(problem, reduction, form))
    results = []
    for case in (problem, one_hot):
        features, centers = case.requiring_grad()
        loss_of(replace(case, features=features, centers=centers), form=form).backward()
        assert features.grad is not None
        assert centers.grad is not None
        moved = F.update_centers(
            case.features,
            case.target,
            case.centers,
            form=form,  # type: ignore[arg-type]
            center_lr=1.0,
            ignore_index=case.ignore_index,
        )
        norms = case.centers.norm(dim=-1, keepdim=True)
        size = torch.maximum(norms, 1 / norms).masked_fill(norms == 0, 1)
        results.append(
            (
                features.grad
                * (case.features.norm(dim=-1, keepdim=True) if form == "paper" else 1),
                centers.grad * norms,
                moved / size,
            )
        )
    for by_index, by_probability in zip(*results, strict=True):
        assert_same(by_probability, by_index)


@property_test(problem=problems(max_exponent=0))
def test_a_small_step_down_the_gradient_lowers_the_loss(problem: Problem) -> None:
    features, centers = problem.requiring_grad()
    before = loss_of(replace(problem, features=features, centers=centers))
    before.backward()
    assert features.grad is not None
    assert centers.grad is not None
    squared = features.grad.square().sum() + centers.grad.square().sum()
    assume(squared > 1e-8)
    # Small relative to all norms, so that the loss is nearly linear over the step.
    norms = torch.cat([features, centers]).detach().norm(dim=-1)
    gradients = torch.cat([features.grad, centers.grad]).norm(dim=-1)
    step = 1e-3 * (norms / gradients)[(norms > 0) & (gradients > 0)].min()
    assume(step * squared > 1e-13)
    after = loss_of(
        replace(
            problem,
            features=features.detach() - step * features.grad,
            centers=centers.detach() - step * centers.grad,
        )
    )
    assert after < before


@property_test(problem=problems(max_exponent=1, weighted=False))
def test_the_update_moves_centers_towards_their_samples(problem: Problem) -> None:
    """Eq. 7 vanishes for centers that sum to zero, and Eq. 6 lowers L_intra."""
    centers = torch.cat([problem.centers, -problem.centers])
    centers = centers / centers.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    target = problem.target
    if target.is_floating_point():
        target = torch.cat([target, torch.zeros_like(target)], dim=1)
    arguments = problem.features, target
    moved = F.update_centers(
        *arguments, centers, form="paper", center_lr=1e-3, ignore_index=problem.ignore_index
    )
    before, after = (
        F.intra_class_loss(*arguments, rows, ignore_index=problem.ignore_index)
        for rows in (centers, moved)
    )
    assert after <= before + 1e-12


@property_test(problem=problems(max_exponent=3), extra=st.integers(1, 5), seed=seeds)
def test_ignored_samples_change_nothing(problem: Problem, extra: int, seed: int) -> None:
    """Even if they hold NaN."""
    assume(not problem.target.is_floating_point())
    torch.manual_seed(seed)
    noise = torch.randn(extra, problem.features.shape[1], dtype=torch.float64)
    noise[0] = torch.nan
    ignored = torch.full((extra,), problem.ignore_index)
    longer = replace(
        problem,
        features=torch.cat([problem.features, noise]),
        target=torch.cat([problem.target, ignored]),
    )
    grads = []
    for case in (problem, longer):
        features, centers = case.requiring_grad()
        loss = loss_of(replace(case, features=features, centers=centers))
        loss.backward()
        assert features.grad is not None
        grads.append((loss, features.grad[: len(problem.features)], centers.grad))
        assert torch.equal(
            features.grad[len(problem.features) :],
            torch.zeros(len(case.features) - len(problem.features), noise.shape[1]).double(),
        )
    for one, other in zip(*grads, strict=True):
        assert one is not None
        assert other is not None
        assert_same(one, other)


@property_test(problem=problems(max_exponent=3, max_sizes=(24, 8, 6)), width=st.integers(1, 3))
def test_leading_dimensions_are_samples(problem: Problem, width: int) -> None:
    features = problem.features.expand(width, *problem.features.shape)
    target = problem.target.expand(width, *problem.target.shape)
    expanded = replace(problem, features=features, target=target)
    assert_same(loss_of(expanded), loss_of(problem))
    each = loss_of(expanded, "none")
    assert each.shape == features.shape[:-1]
    assert_same(each[0], loss_of(problem, "none"))
