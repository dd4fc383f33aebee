"""The metrics of Table 1 against the reference, for all samples at once and in batches."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from separate_loss import functional, metrics
from tests.helpers import reference
from tests.helpers.properties import Problem, assert_equal, problems, property_test

labelled = problems(kind="indices", max_exponent=3, ignoring=False)


@property_test(problem=labelled)
def test_metrics_equal_the_reference(problem: Problem) -> None:
    features, _, centers = problem.arrays
    target, num_classes = problem.target.numpy(), len(centers)
    true_centers = reference.class_centers(features, target, num_classes)
    found = metrics.class_centers(problem.features, problem.target, num_classes)
    assert_equal(found, true_centers, torch.float64, scale=np.abs(features).max())
    for rows, name in ((problem.centers, "learned"), (found, "true")):
        intra = metrics.intra_class_similarity(
            problem.features, problem.target, rows, reduction="none"
        )
        inter = metrics.inter_class_similarity(rows, reduction="none")
        array = rows.numpy()
        expected_intra = reference.intra_class_similarity(features, target, array)
        expected_inter = reference.inter_class_similarity(array)
        # The direction of a mean that cancels is rounding error.
        stable = np.ones(num_classes, dtype=bool)
        if name == "true":
            size = np.array([np.abs(features[target == j]).sum() for j in range(num_classes)])
            stable = ~(np.linalg.norm(array, axis=1) < 1e-6 * size)
        assert_equal(intra[torch.from_numpy(stable)], expected_intra[stable], torch.float64)
        if stable.all():
            assert_equal(inter, expected_inter, torch.float64)
    agreement = metrics.center_agreement(problem.centers, found, reduction="none")
    expected = [
        np.nan if np.isnan(mean).any() else reference.cosine(center, mean)
        for center, mean in zip(centers, found.numpy(), strict=True)
    ]
    assert_equal(agreement, np.array(expected), torch.float64)


@property_test(problem=labelled)
def test_means_are_over_present_classes(problem: Problem) -> None:
    arguments = problem.features, problem.target
    centers = metrics.class_centers(*arguments, len(problem.centers))
    for each, mean in (
        (
            metrics.intra_class_similarity(*arguments, problem.centers, reduction="none"),
            metrics.intra_class_similarity(*arguments, problem.centers),
        ),
        (
            metrics.inter_class_similarity(centers, reduction="none"),
            metrics.inter_class_similarity(centers),
        ),
        (
            metrics.center_agreement(problem.centers, centers, reduction="none"),
            metrics.center_agreement(problem.centers, centers),
        ),
    ):
        present = each[~each.isnan()]
        assert_equal(mean, float(present.mean()) if len(present) else np.nan, torch.float64)
        assert (present.abs() <= 1).all()


@property_test(problem=labelled, size=st.integers(1, 20))
def test_batches_give_the_same_as_all_samples_at_once(problem: Problem, size: int) -> None:
    num_classes, feature_dim = problem.centers.shape
    statistics = metrics.ClassStatistics(num_classes, feature_dim)
    for features, target in zip(
        problem.features.split(size), problem.target.split(size), strict=True
    ):
        assert statistics.update(features, target) is statistics
    whole = metrics.class_centers(problem.features, problem.target, num_classes)
    scale = float(problem.features.abs().max())
    assert_equal(statistics.class_centers(), whole.numpy(), torch.float64, scale)
    for centers in (problem.centers, statistics.class_centers()):
        intra = metrics.intra_class_similarity(problem.features, problem.target, centers)
        assert_equal(statistics.intra_class_similarity(centers), float(intra), torch.float64)
    own = statistics.intra_class_similarity()
    assert_equal(
        own,
        float(statistics.intra_class_similarity(statistics.class_centers())),
        torch.float64,
    )


@property_test(problem=problems(kind="indices", max_exponent=3, ignoring=True))
def test_ignored_samples_are_left_out(problem: Problem) -> None:
    kept = problem.target != problem.ignore_index
    features = problem.features.clone()
    features[~kept] = torch.nan
    num_classes = len(problem.centers)
    found = metrics.class_centers(
        features, problem.target, num_classes, ignore_index=problem.ignore_index
    )
    expected = metrics.class_centers(features[kept], problem.target[kept], num_classes)
    torch.testing.assert_close(found, expected, equal_nan=True)
    intra = metrics.intra_class_similarity(
        features, problem.target, problem.centers, ignore_index=problem.ignore_index
    )
    others = metrics.intra_class_similarity(features[kept], problem.target[kept], problem.centers)
    torch.testing.assert_close(intra, others, equal_nan=True)


def test_class_centers_take_any_type_and_shape_and_have_no_graph() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 6, 4).half().requires_grad_()
    target = torch.randint(3, (2, 6), dtype=torch.int32)
    centers = metrics.class_centers(features, target, 3)
    assert centers.dtype == torch.float64
    assert not centers.requires_grad
    flat = metrics.class_centers(features.detach().double().reshape(-1, 4), target.reshape(-1), 3)
    torch.testing.assert_close(centers, flat, equal_nan=True)


def test_maps_give_what_their_pixels_give() -> None:
    """Also where a shape fits (N, d, *) too, as movedim leaves its trace in memory."""
    for height in (6, 4):
        features, target = torch.randn(2, 4, height, 4), torch.randint(3, (2, height, 4))
        moved, pixels = features.movedim(1, -1), features.movedim(1, -1).reshape(-1, 4)
        centers = metrics.class_centers(moved, target, 3)
        assert torch.equal(centers, metrics.class_centers(pixels, target.flatten(), 3))
        for reduced in ("none", "mean"):
            found = metrics.intra_class_similarity(moved, target, centers, reduction=reduced)
            expected = metrics.intra_class_similarity(
                pixels, target.flatten(), centers, reduction=reduced
            )
            assert torch.equal(found, expected)
        index, cosines = metrics.nearest_center(moved, centers, return_cosines=True)
        assert index.shape == cosines.shape == target.shape
        assert torch.equal(index.flatten(), metrics.nearest_center(pixels, centers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_metrics_change_no_argument_and_have_no_graph(dtype: torch.dtype) -> None:
    features = torch.randn(6, 4, dtype=dtype, requires_grad=True)
    centers = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    target = torch.tensor([0, 1, 2, 0, -100, 1])
    before = features.detach().clone(), centers.detach().clone(), target.clone()
    found = (
        metrics.class_centers(features, target, 3),
        metrics.intra_class_similarity(features, target, centers),
        metrics.inter_class_similarity(centers),
        metrics.center_agreement(centers, centers),
        metrics.ClassStatistics(3, 4).update(features, target).intra_class_similarity(centers),
        *metrics.nearest_center(features, centers, return_cosines=True),
    )
    assert not any(value.requires_grad for value in found)
    for now, then in zip((features, centers, target), before, strict=True):
        assert torch.equal(now, then)


def test_inter_class_similarity_of_one_class_is_nan() -> None:
    centers = metrics.class_centers(torch.rand(3, 4), torch.zeros(3, dtype=torch.long), 2)
    assert metrics.inter_class_similarity(centers).isnan()
    assert metrics.inter_class_similarity(centers, reduction="none").isnan().all()


@property_test(problem=problems(max_exponent=3), seed=st.integers(0, 2**32 - 1))
def test_the_nearest_center_has_the_largest_cosine(problem: Problem, seed: int) -> None:
    features, centers = problem.features, problem.centers
    centers[seed % len(centers)] = 0
    centers[(seed + 1) % len(centers)] = torch.randn(centers.shape[1])
    index, cosines = metrics.nearest_center(features, centers, return_cosines=True)
    assert torch.equal(index, metrics.nearest_center(features, centers))
    for x, chosen, found in zip(features.numpy(), index.tolist(), cosines.tolist(), strict=True):
        candidates = [reference.cosine(x, c) for c in centers.numpy() if c.any()]
        assert centers[chosen].any()
        assert found == pytest.approx(max(candidates), abs=1e-12)
        assert reference.cosine(x, centers[chosen].numpy()) == pytest.approx(found, abs=1e-12)


def test_nearest_center_keeps_dimensions_and_skips_missing_centers() -> None:
    centers = torch.tensor([[torch.nan, torch.nan], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    features = torch.tensor([[[3.0, 1.0], [-1.0, -2.0]], [[0.0, 2.0], [0.0, 0.0]]])
    expected = torch.tensor([[2, 2], [3, 2]])
    assert torch.equal(metrics.nearest_center(features, centers), expected)
    assert torch.equal(metrics.nearest_center(features.half(), centers), expected)
    assert metrics.nearest_center(features[:0], centers).shape == (0, 2)


def test_nearest_center_has_no_class_for_what_has_no_direction() -> None:
    """-1 never equals a label, so such a sample counts as wrong."""
    nan, inf = torch.nan, torch.inf
    features = torch.tensor([[[1.0, 2.0], [nan, 0.0]], [[inf, 1.0], [-inf, inf]]])
    for centers, expected in (
        (torch.eye(2), [[1, -1], [-1, -1]]),
        (torch.zeros(2, 2), [[-1, -1], [-1, -1]]),
        (torch.full((2, 2), nan), [[-1, -1], [-1, -1]]),
        (torch.tensor([[inf, 1.0], [0.0, 0.0]]), [[-1, -1], [-1, -1]]),
        (torch.tensor([[nan, 1.0], [-1.0, 0.0]]), [[1, -1], [-1, -1]]),
    ):
        index, cosines = metrics.nearest_center(features, centers, return_cosines=True)
        assert index.tolist() == expected
        assert torch.equal(metrics.nearest_center(features, centers), index)
        assert torch.equal(cosines.isnan(), index == -1)


def test_nearest_center_of_several_blocks_of_samples() -> None:
    centers, features = torch.randn(2**12, 3), torch.randn(3000, 3)
    index = metrics.nearest_center(features, centers)
    cosines = functional.similarity(features[:50, None], centers)
    assert torch.equal(index[:50], cosines.argmax(-1))
    assert torch.equal(index[-5:], metrics.nearest_center(features[-5:], centers))


def test_nearest_center_refuses_invalid_features() -> None:
    with pytest.raises(ValueError, match="features must have 3 values in the last dimension"):
        metrics.nearest_center(torch.randn(4, 2), torch.randn(5, 3))
    with pytest.raises(TypeError, match="features must be floating point"):
        metrics.nearest_center(torch.zeros(4, 3, dtype=torch.int64), torch.randn(5, 3))
