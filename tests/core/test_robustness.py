"""Zero, tiny, huge, NaN and infinite vectors, and empty batches; the centers stay finite."""

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from separate_loss import SeparateLoss, SoftmaxSeparateLoss, metrics, separate_loss
from separate_loss import functional as F
from tests.helpers.properties import Problem, problems, property_test


@pytest.mark.parametrize("norm", [1e-18, 1e-12, 1.0, 1e12, 1e18])
@pytest.mark.parametrize("other_norm", [1e-18, 1.0, 1e18])
@pytest.mark.parametrize("feature_dim", [1, 3, 64, 512])
@pytest.mark.parametrize("form", ["simplex", "paper"])
def test_the_loss_is_independent_of_norms_in_float32(
    form: Any, norm: float, other_norm: float, feature_dim: int
) -> None:
    """Gradients have the factor 1 / norm, but for features in the simplex form."""
    torch.manual_seed(0)
    units = torch.nn.functional.normalize(torch.randn(6, feature_dim), dim=-1)
    rows = torch.nn.functional.normalize(torch.randn(4, feature_dim), dim=-1)
    target = torch.tensor([0, 1, 2, 0, 1, 2])
    results = []
    for scale, other_scale in ((1.0, 1.0), (norm, other_norm)):
        features = (units * scale).requires_grad_()
        centers = (rows * other_scale).requires_grad_()
        loss = separate_loss(features, target, centers, form=form)
        loss.backward()
        assert features.grad is not None
        assert centers.grad is not None
        moved = F.update_centers(features, target, centers, form=form, center_lr=other_scale**2)
        of_features = features.grad * (scale if form == "paper" else 1)
        results.append((loss, of_features, centers.grad * other_scale, moved / other_scale))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [1e-150, 1e150])
def test_the_loss_is_independent_of_norms_in_float64(norm: float) -> None:
    torch.manual_seed(0)
    features, centers = torch.randn(6, 5).double(), torch.randn(4, 5).double()
    target = torch.tensor([0, 1, 2, 0, 1, 2])
    expected = separate_loss(features, target, centers)
    torch.testing.assert_close(separate_loss(features * norm, target, centers), expected)
    torch.testing.assert_close(separate_loss(features, target, centers * norm), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize(("form", "expected"), [("simplex", 0.5), ("paper", 1.0)])
def test_zero_vectors_have_cosine_0_and_no_gradient(
    form: Any, expected: float, dtype: torch.dtype, kind: str
) -> None:
    features = torch.zeros(3, 4, dtype=dtype, requires_grad=True)
    centers = torch.zeros(2, 4, dtype=dtype, requires_grad=True)
    target = torch.tensor([0, 1, 1])
    if kind == "probabilities":
        target = torch.nn.functional.one_hot(target).to(dtype)
    loss = separate_loss(features, target, centers, form=form)
    loss.backward()
    assert loss == expected
    assert features.grad is not None
    assert centers.grad is not None
    assert not features.grad.any()
    assert not centers.grad.any()
    assert not F.update_centers(features, target, centers, form=form).any()


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("center_update", ["forward", "gradient", "none"])
@pytest.mark.parametrize("size", [0, 1])
def test_batches_of_0_and_1_samples_are_finite(kind: str, center_update: str, size: int) -> None:
    criterion = SeparateLoss(3, 4, center_update=center_update)  # type: ignore[arg-type]
    features = torch.randn(size, 4, requires_grad=True)
    target = (
        torch.ones(size, dtype=torch.long) if kind == "indices" else torch.rand(size, 3).softmax(-1)
    )
    loss = criterion(features, target)
    loss.backward()
    assert loss.isfinite()
    assert criterion.centers.isfinite().all()
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_an_empty_batch_moves_centers_apart() -> None:
    criterion = SeparateLoss(3, 4, center_init="sphere", center_lr=0.1)
    before = criterion.centers.clone()
    criterion(torch.zeros(0, 4, requires_grad=True), torch.zeros(0, dtype=torch.long))
    assert F.inter_class_loss(criterion.centers) < F.inter_class_loss(before)


nonfinite_values = st.sampled_from([torch.nan, torch.inf, -torch.inf])


@property_test(
    problem=problems(max_exponent=3, weighted=False), value=nonfinite_values, data=st.data()
)
def test_the_update_ignores_samples_that_are_not_finite(
    problem: Problem, value: float, data: st.DataObject
) -> None:
    broken = problem.features.clone()
    rows = data.draw(st.sets(st.integers(0, len(broken) - 1), min_size=1))
    for row in rows:
        broken[row, data.draw(st.integers(0, broken.shape[1] - 1))] = value
    whole = torch.tensor([row not in rows for row in range(len(broken))])
    # Only a sample that is not ignored makes the loss non-finite.
    counts = problem.target.is_floating_point() or bool(
        (problem.target[~whole] != problem.ignore_index).any()
    )
    arguments = problem.target, problem.centers
    loss = separate_loss(broken, *arguments, ignore_index=problem.ignore_index)
    assert loss.isfinite() != counts
    moved = F.update_centers(broken, *arguments, center_lr=1.0, ignore_index=problem.ignore_index)
    without = F.update_centers(
        problem.features[whole],
        problem.target[whole],
        problem.centers,
        center_lr=1.0,
        ignore_index=problem.ignore_index,
    )
    assert moved.isfinite().all()
    torch.testing.assert_close(moved, without)


def test_probabilities_that_are_not_finite_keep_centers_finite() -> None:
    torch.manual_seed(0)
    target = torch.rand(6, 3).softmax(-1)
    target[0, 0], target[1, 1] = torch.nan, torch.inf
    criterion = SeparateLoss(3, 4, center_init="sphere")
    with pytest.warns(UserWarning, match="target holds rows that are no class probabilities"):
        assert not criterion(torch.randn(6, 4, requires_grad=True), target).isfinite()
    assert criterion.centers.isfinite().all()


@pytest.mark.parametrize("center_init", ["features", "sphere"])
def test_training_continues_after_a_batch_that_is_not_finite(center_init: str) -> None:
    torch.manual_seed(0)
    criterion = SeparateLoss(3, 4, center_init=center_init)  # type: ignore[arg-type]
    for step in range(10):
        features: Tensor = torch.randn(9, 4)
        if step % 3 == 0:
            features[step % 9] = torch.nan
        if step == 4:
            features[:] = torch.inf
        loss = criterion(features.requires_grad_(), torch.arange(9) % 3)
        assert loss.isfinite() == (step % 3 != 0 and step != 4)
        assert criterion.centers.isfinite().all()


@pytest.mark.parametrize("num_samples", [8, 800])
def test_tiny_centers_of_one_direction_stay_finite(num_samples: int) -> None:
    """Their update is the largest; for fewer samples than classes it once overflowed."""
    torch.manual_seed(0)
    start = torch.zeros(400, 4)
    start[:, 0] = 1e-18
    criterion = SeparateLoss(400, 4, center_init=start)
    for _ in range(3):
        features = torch.randn(num_samples, 4, requires_grad=True)
        assert criterion(features, torch.arange(num_samples) % 400).isfinite()
        assert criterion.centers.isfinite().all()


def test_steps_that_a_grad_scaler_skips_do_no_harm() -> None:
    """Their centers have moved, by samples of the weights that stay: one step in ten here."""
    first, head = nn.Linear(16, 24), nn.Linear(8, 5)
    body = nn.Sequential(first, nn.Tanh(), nn.Linear(24, 8))
    model = nn.Sequential(body, head)
    criterion = SoftmaxSeparateLoss(head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    prototypes, target, skipped = torch.randn(5, 16), torch.arange(500) % 5, 0
    samples = prototypes[target] + 0.7 * torch.randn(500, 16)
    for step in range(120):
        weights, centers = first.weight.clone(), criterion.separate.centers.clone()
        rows = torch.randint(500, (32,))
        with torch.autocast("cpu", dtype=torch.float16):
            loss = criterion(model(samples[rows]), target[rows])
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if step % 10 == 9:
            assert first.weight.grad is not None
            first.weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        skipped += torch.equal(first.weight, weights)
        assert not torch.equal(criterion.separate.centers, centers)
    assert skipped == 12
    means = metrics.class_centers(body(samples), target, 5)
    agreement = metrics.center_agreement(criterion.separate.centers, means, reduction="none")
    assert agreement.min() > 0.98
