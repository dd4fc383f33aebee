"""Figures. They need matplotlib (`pip install separate-loss[plots]`), imported when called."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from separate_loss._checks import check_centers
from separate_loss._terms import normalize

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

__all__ = ["center_similarity", "feature_space"]

MARKERS = {
    "true_centers": ("o", "white", "true center (class mean)"),
    "learned_centers": ("X", "black", "learned center"),
}
LABEL: Any = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "size": 12}


def feature_space(
    points: "Tensor | ArrayLike",
    target: "Tensor | ArrayLike",
    *,
    true_centers: "Tensor | ArrayLike | None" = None,
    learned_centers: "Tensor | ArrayLike | None" = None,
    class_names: Sequence[str] | None = None,
    ignore_index: int = -100,
    axes: "Axes | None" = None,
) -> "Axes":
    """Draws features in the plane, each class with its mean and its center in one colour.

    Args:
        points: features brought to two dimensions (t-SNE, PCA), (N, 2), a tensor or an array.
        target: class indices, (N,). Samples with `ignore_index` or a negative index are left out.
        true_centers: class means in the same plane, (C, 2).
        learned_centers: the loss's centers in the same plane, (C, 2).
        class_names: written at the class means; their indices if None.
        ignore_index: samples with this class index are left out.
        axes: where to draw; new ones if None.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: `target` holds no integers.
        ValueError: `points` or centers are not of shape (*, 2), or `target`, centers or names do
            not fit.

    Examples:
        >>> axes = feature_space(torch.randn(6, 2), torch.arange(6) % 3)
    """
    import matplotlib.pyplot as plt  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415
    from matplotlib.lines import Line2D  # noqa: PLC0415
    from matplotlib.patheffects import withStroke  # noqa: PLC0415

    drawn, labels = _rows("points", points), _array(target)
    if labels.shape != drawn.shape[:1]:
        raise ValueError(f"target must have shape {drawn.shape[:1]}, got {labels.shape}")
    if labels.size and labels.dtype.kind not in "iub":
        raise TypeError(f"target must hold class indices, got {labels.dtype}")
    used = (labels >= 0) & (labels != ignore_index)
    drawn, labels = drawn[used], labels[used].astype(int)
    given = {"true_centers": true_centers, "learned_centers": learned_centers}
    centers = {name: _rows(name, rows) for name, rows in given.items() if rows is not None}
    num_classes = int(labels.max(initial=-1)) + 1
    for name, rows in {**centers, "class_names": class_names}.items():
        if rows is not None and len(rows) < num_classes:
            raise ValueError(f"{name} must hold all {num_classes} classes, got {len(rows)}")
    colors = _colors(max(num_classes, 1, *map(len, centers.values())))
    if axes is None:
        axes = plt.figure(figsize=(6, 6), layout="constrained").add_subplot()
    halo = [withStroke(linewidth=3, foreground="white")]

    for label in np.unique(labels).tolist():
        members = drawn[labels == label]
        x, y = members.T
        axes.scatter(x, y, s=9, color=colors[label], alpha=0.55, linewidths=0)
        finite = members[np.isfinite(members).all(1)]
        mean = finite.mean(0) if len(finite) else [0, 0]
        if "true_centers" in centers and np.isfinite(centers["true_centers"][label]).all():
            mean = centers["true_centers"][label]
        text = str(label) if class_names is None else class_names[label]
        place, color = (mean[0], mean[1]), colors[label]
        axes.annotate(text, place, color=color, weight="bold", path_effects=halo, **LABEL)
    handles = []
    for name, rows in centers.items():
        marker, edge, text = MARKERS[name]
        x, y = rows.T
        axes.scatter(x, y, s=80, c=colors[: len(rows)], marker=marker, edgecolors=edge, zorder=3)
        handle = Line2D([], [], ls="", marker=marker, ms=9, color="gray", mec=edge, label=text)
        handles.append(handle)
    if handles:
        axes.legend(handles=handles, loc="best", fontsize=9, framealpha=0.9)
    axes.set(xticks=[], yticks=[])
    axes.margins(0.06)
    return axes


def _array(values: "Tensor | ArrayLike") -> "NDArray[Any]":
    import numpy as np  # noqa: PLC0415

    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values
    return np.asarray(values)


def _rows(name: str, values: "Tensor | ArrayLike") -> "NDArray[np.float64]":
    rows = _array(values)
    if rows.ndim != 2 or rows.shape[1] != 2:
        raise ValueError(f"{name} must have shape (*, 2), got {rows.shape}")
    return rows.astype(float)


def _colors(num_classes: int) -> "NDArray[np.float64]":
    """A colour for each class: matplotlib's for up to 20 classes, else hues in three tones."""
    import matplotlib.pyplot as plt  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415
    from matplotlib.colors import hsv_to_rgb  # noqa: PLC0415

    index = np.arange(num_classes)
    if num_classes <= 20:
        return plt.get_cmap("tab10" if num_classes <= 10 else "tab20")(index)[:, :3]
    tones = np.array([[1.0, 0.85], [0.55, 0.95], [0.9, 0.5]])
    return hsv_to_rgb(np.column_stack([index / num_classes, tones[index % 3]]))


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
        TypeError, ValueError: `centers` is not a floating-point tensor (C, d), or the number of
            names differs from C.

    Examples:
        >>> axes = center_similarity(torch.randn(3, 8))
    """
    check_centers("centers", centers)
    if class_names is not None and len(class_names) != len(centers):
        raise ValueError(f"class_names must hold {len(centers)} names, got {len(class_names)}")
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
