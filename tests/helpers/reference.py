"""The reference: Eq. 1 to 8 of the paper, then the simplex form, in NumPy, float64 and loops.

It is written from the equations and imports nothing from the package. `probabilities` (N, C) are
class probabilities: one-hot rows for class indices, and rows of zeros for ignored samples. A zero
vector has cosine 0 with every vector, and derivative 0.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def one_hot(target: NDArray[np.int64], num_classes: int, ignore_index: int = -100) -> Array:
    probabilities = np.zeros((len(target), num_classes))
    for i, label in enumerate(target):
        if label != ignore_index:
            probabilities[i, label] = 1
    return probabilities


def cosine(a: Array, b: Array) -> float:
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms > 0 else 0.0


def similarity(a: Array, b: Array) -> float:
    """Eq. 1."""
    return (cosine(a, b) + 1) / 2


def sample_weights(probabilities: Array, weight: Array) -> Array:
    weights = np.zeros(len(probabilities))
    for i in range(len(probabilities)):
        for j in range(len(weight)):
            weights[i] += probabilities[i, j] * weight[j]
    return weights


def intra_terms(features: Array, probabilities: Array, centers: Array, weight: Array) -> Array:
    """The summands of Eq. 2, times the sample weights."""
    terms = np.zeros(len(features))
    for i in range(len(features)):
        for j in range(len(centers)):
            if probabilities[i, j] != 0:
                terms[i] += (
                    probabilities[i, j] * weight[j] * (1 - similarity(features[i], centers[j]))
                )
    return terms


def inter_loss(centers: Array) -> float:
    """Eq. 3."""
    num_classes = len(centers)
    total = 0.0
    for k in range(num_classes):
        for j in range(num_classes):
            if j != k:
                total += cosine(centers[k], centers[j]) + 1
    return total / (2 * num_classes * (num_classes - 1))


def intra_loss(
    features: Array, probabilities: Array, centers: Array, weight: Array, reduction: str
) -> Array:
    """Eq. 2."""
    terms = intra_terms(features, probabilities, centers, weight)
    return _reduce(terms, sample_weights(probabilities, weight), 0.0, reduction)


def separate_loss(
    features: Array,
    probabilities: Array,
    centers: Array,
    weight: Array,
    reduction: str,
    form: str = "paper",
) -> Array:
    """Eq. 4."""
    terms = intra_terms(features, probabilities, centers, weight)
    inter = inter_loss(centers) if form == "paper" else simplex_loss(centers)
    return _reduce(terms, sample_weights(probabilities, weight), inter, reduction)


def _reduce(terms: Array, weights: Array, inter: float, reduction: str) -> Array:
    if reduction == "none":
        return terms + weights * inter
    if reduction == "sum":
        return np.asarray(terms.sum() + weights.sum() * inter)
    return np.asarray((terms.sum() / weights.sum() if weights.sum() > 0 else 0.0) + inter)


def derivative(of: Array, along: Array) -> Array:
    """The derivative of cos(of, along) for `of`, as in Eq. 5, 6 and 7."""
    a, b = float(np.linalg.norm(of)), float(np.linalg.norm(along))
    if a == 0 or b == 0:
        return np.zeros_like(of)
    return along / (a * b) - (of @ along) * of / (a**3 * b)


def features_gradient(
    features: Array, probabilities: Array, centers: Array, weight: Array
) -> Array:
    """Eq. 5, with the weighted mean in place of 1/m."""
    gradient = np.zeros_like(features)
    weights = sample_weights(probabilities, weight).sum()
    for i in range(len(features)):
        for j in range(len(centers)):
            if probabilities[i, j] * weight[j] != 0:
                pull = derivative(features[i], centers[j])
                gradient[i] -= probabilities[i, j] * weight[j] / (2 * weights) * pull
    return gradient


def intra_direction(features: Array, probabilities: Array, centers: Array) -> Array:
    """Eq. 6."""
    direction = np.zeros_like(centers)
    samples = probabilities.sum()
    for j in range(len(centers)):
        count = probabilities[:, j].sum()
        for i in range(len(features)):
            if probabilities[i, j] != 0:
                pull = probabilities[i, j] * derivative(centers[j], features[i])
                direction[j] -= pull / (2 * samples * (1 + count))
    return direction


def inter_direction(centers: Array) -> Array:
    """Eq. 7."""
    num_classes = len(centers)
    direction = np.zeros_like(centers)
    for j in range(num_classes):
        for k in range(num_classes):
            if k != j:
                push = derivative(centers[j], centers[k])
                direction[j] += push / (2 * num_classes * (num_classes - 1))
    return direction


def update_centers(
    features: Array,
    probabilities: Array,
    centers: Array,
    center_lr: float | None,
    form: str = "paper",
) -> Array:
    """Eq. 8; without `center_lr`, alpha is `default_center_lr`."""
    intra = intra_direction(features, probabilities, centers)
    apart = inter_direction(centers) if form == "paper" else simplex_direction(centers)
    alpha = default_center_lr(probabilities, centers, form) if center_lr is None else center_lr
    return centers - alpha * (intra + apart)


def default_center_lr(probabilities: Array, centers: Array, form: str = "paper") -> float:
    """0.1 times the number of samples (1 for none), at most 4 (C - 1), or 4 (n - 1) for n > 1."""
    n = len(centers) if form == "paper" else max(2, len(nonzero(centers)))
    return float(min(0.1 * (probabilities.sum() or 1), 4 * (n - 1)))


def smooth(probabilities: Array, label_smoothing: float) -> Array:
    """Label smoothing; rows of zeros, of ignored samples, stay zero."""
    smoothed = np.zeros_like(probabilities)
    num_classes = probabilities.shape[1]
    for i in range(len(probabilities)):
        if probabilities[i].any():
            for j in range(num_classes):
                smoothed[i, j] = (1 - label_smoothing) * probabilities[i, j]
                smoothed[i, j] += label_smoothing / num_classes
    return smoothed


def nonzero(centers: Array) -> list[int]:
    return [j for j in range(len(centers)) if centers[j].any()]


def simplex_loss(centers: Array) -> float:
    """L_inter of the simplex form, over the centers that are not zero."""
    present = nonzero(centers)
    n = len(present)
    total = 0.0
    for k in present:
        for j in present:
            if j != k:
                total += (cosine(centers[k], centers[j]) + 1 / (n - 1)) ** 2
    return total / (n * (n - 1) * (1 + 1 / (n - 1)) ** 2) if n > 1 else 0.0


def simplex_direction(centers: Array) -> Array:
    """Half of the gradient of `simplex_loss`."""
    present = nonzero(centers)
    n = len(present)
    direction = np.zeros_like(centers)
    for j in present:
        for k in present:
            if k != j:
                a = 1 / (n - 1)
                push = 2 * (cosine(centers[j], centers[k]) + a) * derivative(centers[j], centers[k])
                direction[j] += push / (n * (n - 1) * (1 + a) ** 2)
    return direction


def centers_gradient(features: Array, probabilities: Array, centers: Array) -> Array:
    """The gradient of Eq. 4 for the centers: Eq. 6 without 1 + n_j, and Eq. 7 twice."""
    intra = intra_direction(features, probabilities, centers)
    for j in range(len(centers)):
        intra[j] *= 1 + probabilities[:, j].sum()
    return intra + 2 * inter_direction(centers)


def class_centers(features: Array, target: NDArray[np.int64], num_classes: int) -> Array:
    centers = np.full((num_classes, features.shape[1]), np.nan)
    for j in range(num_classes):
        members = [features[i] for i in range(len(features)) if target[i] == j]
        if members:
            centers[j] = sum(members) / len(members)
    return centers


def intra_class_similarity(features: Array, target: NDArray[np.int64], centers: Array) -> Array:
    """The mean cosine of each class's features to its center."""
    figures = np.full(len(centers), np.nan)
    for j in range(len(centers)):
        members = [cosine(features[i], centers[j]) for i in range(len(features)) if target[i] == j]
        if members:
            figures[j] = sum(members) / len(members)
    return figures


def inter_class_similarity(centers: Array) -> Array:
    """The mean cosine of each center to the others; rows of NaN are absent classes."""
    present = [j for j in range(len(centers)) if not np.isnan(centers[j]).any()]
    figures = np.full(len(centers), np.nan)
    if len(present) > 1:
        for j in present:
            others = [cosine(centers[j], centers[k]) for k in present if k != j]
            figures[j] = sum(others) / len(others)
    return figures
