"""Figures. They need matplotlib (`pip install separate-loss[plots]`), imported when called."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from separate_loss._checks import check_centers
from separate_loss._terms import normalize

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["center_similarity", "feature_space"]


def feature_space(
    points: Tensor,
    target: Tensor,
    *,
    true_centers: Tensor | None = None,
    learned_centers: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    axes: "Axes | None" = None,
) -> "Axes":
    """Draws features in the plane, classes in colour, true and learned centers marked.

    Args:
        points: features brought to two dimensions (t-SNE, PCA), (N, 2).
        target: class indices, (N,).
        true_centers: class means in the same plane, (C, 2).
        learned_centers: the loss's centers in the same plane, (C, 2).
        class_names: written beside the classes; their indices if None.
        axes: where to draw; new ones if None.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `points` or centers are not of shape (*, 2), or `target` does not fit.

    Examples:
        >>> axes = feature_space(torch.randn(6, 2), torch.arange(6) % 3)
    """
    for name, rows in (
        ("points", points),
        ("true_centers", true_centers),
        ("learned_centers", learned_centers),
    ):
        if rows is not None and (rows.ndim != 2 or rows.shape[1] != 2):
            raise ValueError(f"{name} must have shape (*, 2), got {tuple(rows.shape)}")
    if target.shape != points.shape[:1]:
        raise ValueError(
            f"target must have shape {tuple(points.shape[:1])}, got {tuple(target.shape)}"
        )
    import matplotlib.pyplot as plt  # noqa: PLC0415
    from matplotlib.patheffects import withStroke  # noqa: PLC0415

    if axes is None:
        axes = plt.figure(figsize=(6, 6), layout="constrained").add_subplot()
    points, target = points.detach().cpu(), target.cpu()
    colors = plt.get_cmap("tab10" if int(target.max()) < 10 else "tab20")
    halo = [withStroke(linewidth=3, foreground="white")]
    for label in target.unique().tolist():
        members = points[target == label]
        x, y = members.unbind(1)
        axes.scatter(
            x.numpy(), y.numpy(), s=9, color=colors(label % colors.N), alpha=0.55, linewidths=0
        )
        name = str(label) if class_names is None else class_names[label]
        # Above the bulk of the class, not above its outliers.
        axes.annotate(
            name,
            (float(x.median()), float(y.quantile(0.9))),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=12,
            fontweight="bold",
            color=colors(label % colors.N),
            path_effects=halo,
        )
    for rows, marker, size, face, name in (
        (true_centers, "o", 90, "white", "true center (class mean)"),
        (learned_centers, "X", 55, "black", "learned center"),
    ):
        if rows is not None:
            axes.scatter(
                rows[:, 0].detach().cpu().numpy(),
                rows[:, 1].detach().cpu().numpy(),
                marker=marker,
                s=size,
                facecolor=face,
                edgecolor="black" if face == "white" else "white",
                linewidths=1.4 if face == "white" else 0.8,
                label=name,
            )
    if true_centers is not None or learned_centers is not None:
        axes.legend(loc="best", fontsize=9, framealpha=0.9)
    axes.set(xticks=[], yticks=[])
    axes.margins(0.06)
    return axes


def center_similarity(
    centers: Tensor, *, class_names: Sequence[str] | None = None, axes: "Axes | None" = None
) -> "Axes":
    """Draws the cosines between centers of different classes as a matrix, from -1 to 1.

    Args:
        centers: learned centers or class means, (C, d).
        class_names: beside the rows and columns; their indices if None.
        axes: where to draw; new ones if None.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: `centers` is not a floating-point tensor (C, d).

    Examples:
        >>> axes = center_similarity(torch.randn(3, 8))
    """
    check_centers("centers", centers)
    import matplotlib.pyplot as plt  # noqa: PLC0415

    if axes is None:
        axes = plt.figure(figsize=(4, 4), layout="constrained").add_subplot()
    units, _ = normalize(centers.detach().double().cpu())
    cosines = (units @ units.mT).fill_diagonal_(torch.nan)
    image = axes.imshow(cosines.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    ticks = range(len(centers))
    names = [str(i) for i in ticks] if class_names is None else class_names
    axes.set_xticks(ticks, names)
    axes.set_yticks(ticks, names)
    axes.figure.colorbar(image, ax=axes, label="cosine")
    return axes
