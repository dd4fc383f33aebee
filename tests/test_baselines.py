"""The baselines against their papers' formulas, in NumPy loops."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks import baselines
from tests.helpers import reference

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

TARGETS = {
    "mixed": [0, 2, 2, 1, 0, 2, 3],
    "one class": [1, 1, 1, 1],
    "a single sample": [4],
    "all different": [0, 1, 2, 3, 4],
}


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


def center_loss(features: Array, target: Indices, centers: Array) -> float:
    """Wen et al., Eq. 2."""
    total = 0.0
    for i, label in enumerate(target):
        total += 0.5 * float(np.linalg.norm(features[i] - centers[label])) ** 2
    return total


def center_step(features: Array, target: Indices, centers: Array, one: int) -> Array:
    """Wen et al., Eq. 4 with `one` = 1; the gradient of their Eq. 2 is its numerator."""
    step = np.zeros_like(centers)
    for j in range(len(centers)):
        count = 0
        for i, label in enumerate(target):
            if label == j:
                step[j] += centers[j] - features[i]
                count += 1
        if one:
            step[j] /= 1 + count
    return step


def features_gradient(features: Array, target: Indices, centers: Array) -> Array:
    """Wen et al., Eq. 3."""
    return np.stack([features[i] - centers[label] for i, label in enumerate(target)])


def island_pairs(centers: Array) -> float:
    """Cai et al., the second term of their Eq. 6, without its weight."""
    total = 0.0
    for j in range(len(centers)):
        for k in range(len(centers)):
            if k != j:
                norms = np.linalg.norm(centers[k]) * np.linalg.norm(centers[j])
                total += centers[k] @ centers[j] / norms + 1
    return total


def test_center_loss(target: Tensor) -> None:
    loss, grad, grad_centers, features, centers = run(baselines.CenterLoss(5, 6), target)
    labels, samples = target.numpy(), len(target)
    assert loss == pytest.approx(center_loss(features, labels, centers) / samples)
    np.testing.assert_allclose(grad, features_gradient(features, labels, centers) / samples)
    np.testing.assert_allclose(grad_centers, center_step(features, labels, centers, one=1))


def test_center_loss_by_matrix(target: Tensor) -> None:
    loss, grad, grad_centers, features, centers = run(baselines.CenterLossByMatrix(5, 6), target)
    labels, samples = target.numpy(), len(target)
    # No half; each of the N (C - 1) zeros beside the own distances is clamped to 1e-12.
    assert loss == pytest.approx(2 * center_loss(features, labels, centers) / samples)
    np.testing.assert_allclose(grad, 2 * features_gradient(features, labels, centers) / samples)
    step = center_step(features, labels, centers, one=0)
    np.testing.assert_allclose(grad_centers, 2 * step / samples, atol=1e-12)


def test_island_loss(target: Tensor) -> None:
    loss, grad, grad_centers, features, centers = run(baselines.IslandLoss(5, 6, 3.0), target)
    labels, samples = target.numpy(), len(target)
    center = center_loss(features, labels, centers) / samples
    assert loss == pytest.approx(center + 3 * island_pairs(centers))
    np.testing.assert_allclose(grad, features_gradient(features, labels, centers) / samples)
    # Under autograd each pair counts from both of its sides.
    pairs = np.zeros_like(centers)
    for j in range(len(centers)):
        for k in range(len(centers)):
            if k != j:
                pairs[j] += 2 * reference.derivative(centers[j], centers[k])
    step = center_step(features, labels, centers, one=1) + 3 * pairs
    np.testing.assert_allclose(grad_centers, step)


def test_textbook_separate_loss(target: Tensor) -> None:
    criterion = baselines.TextbookSeparateLoss(5, 6)
    loss, grad, grad_centers, features, centers = run(criterion, target)
    shares, ones = reference.one_hot(target.numpy(), 5), np.ones(5)
    assert loss == pytest.approx(
        float(reference.separate_loss(features, shares, centers, ones, "mean"))
    )
    expected = reference.features_gradient(features, shares, centers, ones)
    np.testing.assert_allclose(grad, expected)
    expected = reference.centers_gradient(features, shares, centers)
    np.testing.assert_allclose(grad_centers, expected, atol=1e-14)


def test_batch_hard_triplets(target: Tensor) -> None:
    margin = 2.0
    loss, grad, _, features, _ = run(baselines.BatchHardTripletLoss(margin), target)
    terms, labels = [], target.tolist()
    for a in range(len(labels)):
        gaps = [float(np.linalg.norm(features[a] - other)) for other in features]
        near = [gaps[i] for i in range(len(labels)) if i != a and labels[i] == labels[a]]
        far = [gaps[i] for i in range(len(labels)) if labels[i] != labels[a]]
        if near and far:
            terms.append(max(0.0, max(near) - min(far) + margin))
    # torch adds 1e-6 to the differences, to keep their norms differentiable.
    assert loss == pytest.approx(np.mean(terms) if terms else 0.0, abs=1e-4)
    assert np.isfinite(grad).all()
    assert grad.any() == any(terms)
