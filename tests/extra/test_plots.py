"""Plots show the given values, and refuse invalid arguments."""

from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba

from separate_loss import plots


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def test_feature_space_draws_each_class_once_and_both_kinds_of_centers() -> None:
    torch.manual_seed(0)
    points, target = torch.randn(30, 2, requires_grad=True), torch.arange(30) % 3
    centers = torch.randn(3, 2)
    axes = plots.feature_space(
        points,
        target,
        true_centers=centers,
        learned_centers=centers + 1,
        class_names=["joy", "fear", "anger"],
    )
    drawn = [np.asarray(part.get_offsets()) for part in axes.collections]
    for label in range(3):
        np.testing.assert_allclose(drawn[label], points.detach()[target == label].numpy())
    np.testing.assert_allclose(drawn[3], centers.numpy())
    np.testing.assert_allclose(drawn[4], (centers + 1).numpy())
    assert [text.get_text() for text in axes.texts] == ["joy", "fear", "anger"]
    colors = {to_rgba(part.get_facecolor()[0][:3]) for part in axes.collections[:3]}  # type: ignore[index]
    assert len(colors) == 3
    legend = axes.get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == 2


def test_feature_space_draws_a_class_with_its_mean_and_center_in_one_colour() -> None:
    torch.manual_seed(0)
    means = torch.randn(4, 2) * 9
    target = torch.arange(40) % 3  # class 3 has a center and no sample
    points = means[target] + torch.randn(40, 2)
    axes = plots.feature_space(points, target, true_centers=means, learned_centers=means + 1)
    of_points, (of_means, of_centers) = axes.collections[:3], axes.collections[3:]
    for label, part in enumerate(of_points):
        color = np.asarray(part.get_facecolor())[0, :3]
        for centers in (of_means, of_centers):
            np.testing.assert_array_equal(np.asarray(centers.get_facecolor())[label, :3], color)
        text: Any = axes.texts[label]
        np.testing.assert_allclose(text.xy, means[label], rtol=1e-6)
        np.testing.assert_array_equal(to_rgba(text.get_color())[:3], color)
    assert len(np.asarray(of_centers.get_facecolor())) == 4


def test_names_are_at_the_mean_of_the_points_where_no_other_is_given() -> None:
    points, target = torch.randn(30, 2), torch.arange(30) % 3
    points[0] = torch.nan
    means = torch.full((3, 2), torch.nan)
    for axes in (
        plots.feature_space(points, target),
        plots.feature_space(points, target, true_centers=means),
    ):
        for label, text in enumerate(axes.texts):
            position: Any = text
            expected = points[target == label].nanmean(0)
            np.testing.assert_allclose(position.xy, expected, rtol=1e-5)
        axes.figure.canvas.draw()


READ_ONLY = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("points", "target"),
    [
        (READ_ONLY, np.arange(30) % 3),
        (READ_ONLY, (np.arange(30) % 3).astype(np.uint8)),
        (READ_ONLY.astype(np.float16), torch.arange(30) % 3),
        (torch.tensor(READ_ONLY).half(), torch.arange(30, dtype=torch.int32) % 3),
        (torch.tensor(READ_ONLY).bfloat16().requires_grad_(), [0, 1, 2] * 10),
        (torch.tensor(READ_ONLY * 9).long(), np.arange(30) % 3),
        (READ_ONLY.tolist(), np.arange(30) % 3),
        (READ_ONLY, np.arange(30) % 2 == 1),
    ],
)
def test_feature_space_takes_tensors_and_arrays_of_each_type(points: Any, target: Any) -> None:
    """t-SNE of scikit-learn returns an array."""
    centers: Any = points[:3]
    axes = plots.feature_space(points, target, true_centers=centers, learned_centers=centers)
    expected = points.detach().double().numpy() if isinstance(points, torch.Tensor) else points
    labels = np.asarray(target).astype(int)
    for label in range(labels.max() + 1):
        drawn = np.asarray(axes.collections[label].get_offsets())
        np.testing.assert_allclose(drawn, np.asarray(expected)[labels == label], rtol=1e-6)


@pytest.mark.parametrize("ignored", [-100, -1, 255])
@pytest.mark.parametrize("class_names", [None, ["a", "b", "c"]])
def test_ignored_samples_are_left_out(ignored: int, class_names: list[str] | None) -> None:
    points, target = torch.randn(30, 2), torch.arange(30) % 3
    target[:5] = ignored
    given: Any = {"ignore_index": 255} if ignored == 255 else {}
    axes = plots.feature_space(points, target, class_names=class_names, **given)
    assert [text.get_text() for text in axes.texts] == (class_names or ["0", "1", "2"])
    assert len(axes.collections) == 3
    assert sum(len(np.asarray(part.get_offsets())) for part in axes.collections) == 25
    plots.feature_space(points, torch.full((30,), ignored), **given)
    plots.feature_space(points[:0], target[:0], **given)


@pytest.mark.parametrize("num_classes", [2, 10, 11, 20, 21, 30, 100])
def test_colours_keep_classes_apart(num_classes: int) -> None:
    target = torch.arange(2 * num_classes) % num_classes
    axes = plots.feature_space(torch.randn(len(target), 2), target)
    colors = np.array([np.asarray(part.get_facecolor())[0, :3] for part in axes.collections])
    distances = np.linalg.norm(colors[:, None] - colors, axis=-1)[~np.eye(num_classes, dtype=bool)]
    assert distances.min() > (0.09 if num_classes <= 30 else 0.03)
    assert colors.min(0).max() < 0.95  # none is white


def test_center_similarity_draws_the_cosines_of_different_classes() -> None:
    axes = plots.center_similarity(torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    drawn: Any = np.ma.asarray(axes.images[0].get_array()).filled(np.nan)
    nan = np.nan
    np.testing.assert_allclose(drawn, [[nan, 0, -1], [0, nan, 0], [-1, 0, nan]])


def test_invalid_arguments_are_refused() -> None:
    points, target = torch.randn(4, 2), torch.arange(4)
    with pytest.raises(ValueError, match=r"points must have shape \(\*, 2\), got \(4, 3\)"):
        plots.feature_space(torch.randn(4, 3), target)
    with pytest.raises(ValueError, match=r"true_centers must have shape \(\*, 2\), got \(2,\)"):
        plots.feature_space(points, target, true_centers=torch.randn(2))
    with pytest.raises(ValueError, match=r"target must have shape \(4,\), got \(3,\)"):
        plots.feature_space(points, target[:3])
    with pytest.raises(TypeError, match="target must hold class indices, got float64"):
        plots.feature_space(points, target.float())
    with pytest.raises(ValueError, match=r"learned_centers must hold all 4 classes, got 3"):
        plots.feature_space(points, target, learned_centers=points[:3])
    with pytest.raises(ValueError, match=r"class_names must hold all 4 classes, got 1"):
        plots.feature_space(points, target, class_names=["a"])
    with pytest.raises(ValueError, match="class_names must hold 4 names, got 1"):
        plots.center_similarity(points, class_names=["a"])
    with pytest.raises(ValueError, match="centers must hold at least 2 classes"):
        plots.center_similarity(points[:1])
