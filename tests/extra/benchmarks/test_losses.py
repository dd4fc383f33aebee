"""The baselines against their papers' formulas, in NumPy loops."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks import losses, training
from benchmarks.losses import LOSSES
from benchmarks.steps import Size, draw_batch, prepare
from tests.helpers import reference

Array = NDArray[np.float64]
TARGETS = {"mixed": [0, 2, 2, 1, 0, 2, 3], "one class": [1, 1, 1, 1], "a single sample": [4]}


@pytest.fixture(params=list(TARGETS.values()), ids=list(TARGETS))
def target(request: pytest.FixtureRequest) -> Tensor:
    torch.manual_seed(0)
    return torch.tensor(request.param)


def run(criterion: nn.Module, target: Tensor) -> tuple[float, Array, Array, Array, Array]:
    """The loss, the gradients of features and centers, and features and centers themselves."""
    criterion = criterion.double()
    features = torch.randn(len(target), 6, dtype=torch.float64, requires_grad=True)
    loss = criterion(features, target)
    loss.backward()
    centers: Any = next(criterion.parameters(), torch.zeros(0))
    found = features.grad, centers.grad, features, centers
    return loss.item(), *(np.zeros(0) if x is None else x.detach().numpy() for x in found)


def center_loss(features: Array, target: Tensor, centers: Array) -> float:
    """Wen et al., Eq. 2."""
    pairs = zip(features, target.tolist(), strict=True)
    return sum(0.5 * float(np.linalg.norm(x - centers[label])) ** 2 for x, label in pairs)


def center_step(features: Array, target: Tensor, centers: Array, divided: bool) -> Array:
    """Wen et al., Eq. 4; without its division the gradient of their Eq. 2."""
    step = np.zeros_like(centers)
    for j in range(len(centers)):
        rows = features[target.numpy() == j]
        step[j] = sum((centers[j] - row for row in rows), np.zeros(centers.shape[1]))
        step[j] /= 1 + len(rows) if divided else 1
    return step


def test_center_loss_equals_its_formula(target: Tensor) -> None:
    loss, grad, grad_centers, features, centers = run(losses.CenterLoss(5, 6), target)
    assert loss == pytest.approx(center_loss(features, target, centers) / len(target))
    np.testing.assert_allclose(grad, (features - centers[target]) / len(target))
    np.testing.assert_allclose(grad_centers, center_step(features, target, centers, True))


def test_center_loss_by_gather_equals_its_formula(target: Tensor) -> None:
    loss, grad, grad_centers, features, centers = run(losses.CenterLossByGather(5, 6), target)
    assert loss == pytest.approx(center_loss(features, target, centers) / len(target))
    np.testing.assert_allclose(grad, (features - centers[target]) / len(target))
    step = center_step(features, target, centers, False) / len(target)
    np.testing.assert_allclose(grad_centers, step)


def test_center_loss_by_matrix_equals_its_formula(target: Tensor) -> None:
    loss, grad, grad_centers, features, centers = run(losses.CenterLossByMatrix(5, 6), target)
    # No half; each of the N (C - 1) zeros beside the own distances is clamped to 1e-12.
    assert loss == pytest.approx(2 * center_loss(features, target, centers) / len(target))
    np.testing.assert_allclose(grad, 2 * (features - centers[target]) / len(target))
    step = 2 * center_step(features, target, centers, False) / len(target)
    np.testing.assert_allclose(grad_centers, step, atol=1e-12)


def test_separate_loss_over_pairs_equals_eq_2_and_3(target: Tensor) -> None:
    loss, grad, grad_centers, features, centers = run(losses.SeparateLossOverPairs(5, 6), target)
    probabilities, ones = reference.one_hot(target.numpy(), 5), np.ones(5)
    expected = float(reference.separate_loss(features, probabilities, centers, ones, "mean"))
    assert loss == pytest.approx(expected)
    np.testing.assert_allclose(
        grad, reference.features_gradient(features, probabilities, centers, ones)
    )
    step = reference.centers_gradient(features, probabilities, centers)
    np.testing.assert_allclose(grad_centers, step, atol=1e-14)


def test_batch_hard_triplet_loss_equals_its_formula(target: Tensor) -> None:
    loss, grad, _, features, _ = run(losses.BatchHardTripletLoss(2.0), target)
    terms, labels = [], target.tolist()
    for a, label in enumerate(labels):
        gaps = [float(np.linalg.norm(features[a] - other)) for other in features]
        near = [gaps[i] for i in range(len(labels)) if i != a and labels[i] == label]
        far = [gaps[i] for i in range(len(labels)) if labels[i] != label]
        if near and far:
            terms.append(max(0.0, max(near) - min(far) + 2.0))
    # torch adds 1e-6 to the differences, to keep their norms differentiable.
    assert loss == pytest.approx(np.mean(terms) if terms else 0.0, abs=1e-4)
    assert grad.any() == any(terms)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if not loss.compiled])
def test_each_step_starts_without_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    features, target = draw_batch(Size(24, 5, 4), "cpu")
    step = prepare(name, features, target, 4)
    step()
    assert features.grad is not None
    norm = features.grad.norm()
    for _ in range(3):
        step()
    assert 0 < features.grad.norm() < 2 * norm


@pytest.mark.parametrize("bins", [5, 15])
def test_calibration_error_equals_its_loops(bins: int) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 4).double() * 3, torch.randint(4, (50,))
    correct, confidence = logits.argmax(-1) == labels, logits.softmax(-1).amax(-1)
    expected = 0.0
    for index in range(bins):
        inside = (confidence * bins >= index) & (confidence * bins < index + 1)
        expected += abs(float((confidence - correct.double())[inside].sum())) / 50
    found = training.calibration_error(logits, correct, bins)
    assert float(found) == pytest.approx(expected)
