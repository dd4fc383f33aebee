"""Label smoothing: the value and gradients of smoothed probabilities, the update of the labels."""

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from separate_loss import SeparateLoss, SoftmaxSeparateLoss, separate_loss
from separate_loss.functional import intra_class_loss
from tests.helpers import reference
from tests.helpers.properties import REDUCTIONS, Problem, assert_equal, problems, property_test

SMOOTHING = st.floats(0, 1)
FORMS = st.sampled_from(["simplex", "paper"])


@property_test(problem=problems(max_exponent=3), smoothing=SMOOTHING, reduction=REDUCTIONS)
def test_the_value_equals_the_reference_with_smoothed_probabilities(
    problem: Problem, smoothing: float, reduction: Any
) -> None:
    x, probabilities, c = problem.arrays
    smoothed = reference.smooth(probabilities, smoothing)
    options: Any = {
        "weight": problem.weight, "ignore_index": problem.ignore_index,
        "reduction": reduction, "label_smoothing": smoothing,
    }  # fmt: skip
    arguments = problem.features, problem.target, problem.centers
    found = separate_loss(*arguments, form="paper", **options)
    expected = reference.separate_loss(x, smoothed, c, problem.weights, reduction)
    assert_equal(found, expected, torch.float64)
    of_intra = reference.intra_loss(x, smoothed, c, problem.weights, reduction)
    assert_equal(intra_class_loss(*arguments, **options), of_intra, torch.float64)


@property_test(problem=problems(max_exponent=1), smoothing=SMOOTHING, form=FORMS)
def test_gradients_equal_those_of_smoothed_probabilities(
    problem: Problem, smoothing: float, form: Any
) -> None:
    smoothed = torch.from_numpy(reference.smooth(problem.arrays[1], smoothing))
    results = []
    for target, label_smoothing in ((problem.target, smoothing), (smoothed, 0.0)):
        features, centers = problem.requiring_grad()
        loss = separate_loss(
            features, target, centers, form=form, weight=problem.weight,
            ignore_index=problem.ignore_index, label_smoothing=label_smoothing,
        )  # fmt: skip
        results.append(torch.autograd.grad(loss, (features, centers)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("num_classes", [3, 300])
def test_centers_move_by_the_labels_alone(num_classes: int, kind: str) -> None:
    plain, smoothed = (
        SeparateLoss(num_classes, 4, label_smoothing=smoothing) for smoothing in (0.0, 0.2)
    )
    for _ in range(3):
        features, target = torch.randn(8, 4), torch.randint(num_classes, (8,))
        if kind == "probabilities":
            target = torch.randn(8, num_classes).softmax(-1)
        plain(features, target), smoothed(features, target)
        torch.testing.assert_close(plain.centers, smoothed.centers)


def test_the_joint_loss_smooths_both_terms() -> None:
    head, target = torch.nn.Linear(4, 3), torch.arange(8) % 3
    features = torch.randn(8, 4, requires_grad=True)
    centers, weight = torch.randn(3, 4), torch.rand(3)
    options: Any = {"weight": weight, "label_smoothing": 0.2}
    criterion = SoftmaxSeparateLoss(head, center_update="none", center_init=centers, **options)
    expected = cross_entropy(head(features), target, **options)
    expected = expected + separate_loss(features, target, centers, **options)
    torch.testing.assert_close(criterion(head(features), target), expected)


def test_no_memory_for_samples_times_classes() -> None:
    """A matrix of 1,000 samples and 4,000 classes would take 16 MB."""
    criterion = SeparateLoss(4000, 8, center_init="sphere", label_smoothing=0.1)
    features, target = torch.randn(1000, 8, requires_grad=True), torch.randint(4000, (1000,))
    with torch.profiler.profile(profile_memory=True) as profile:
        criterion(features, target).backward()
    assert 0 < max(event.cpu_memory_usage for event in profile.events()) < 2**20


@pytest.mark.parametrize("value", [-0.1, 1.5, True, "0.1", float("nan")])
def test_other_values_are_refused(value: Any) -> None:
    vectors, target = torch.randn(3, 4), torch.arange(3)
    for call in (
        lambda: separate_loss(vectors, target, vectors, label_smoothing=value),
        lambda: intra_class_loss(vectors, target, vectors, label_smoothing=value),
        lambda: SeparateLoss(3, 4, label_smoothing=value),
        lambda: SoftmaxSeparateLoss(torch.nn.Linear(4, 3), label_smoothing=value),
    ):
        with pytest.raises((TypeError, ValueError), match="label_smoothing must be"):
            call()
