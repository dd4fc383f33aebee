"""Plots show the given values, and refuse invalid arguments."""

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba

from separate_loss import plots


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
    with pytest.raises(ValueError, match="centers must hold at least 2 classes"):
        plots.center_similarity(points[:1])
