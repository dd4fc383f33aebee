"""The oracle: Eq. 1 to 8 of the paper in NumPy, float64 and plain loops.

Written from the equations and independent of the package. `shares` (N, C) says how much of each
sample belongs to each class: a row of zeros with a single 1 under class indices, a row of zeros for
an ignored sample. A zero vector has cosine 0 with everything, and no derivative.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def shares_of(target: NDArray[np.int64], num_classes: int, ignore_index: int = -100) -> Array:
    shares = np.zeros((len(target), num_classes))
    for i, label in enumerate(target):
        if label != ignore_index:
            shares[i, label] = 1
    return shares


def cosine(a: Array, b: Array) -> float:
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms > 0 else 0.0


def similarity(a: Array, b: Array) -> float:
    """Eq. 1."""
    return (cosine(a, b) + 1) / 2


def masses(shares: Array, weight: Array) -> Array:
    mass = np.zeros(len(shares))
    for i in range(len(shares)):
        for j in range(len(weight)):
            mass[i] += shares[i, j] * weight[j]
    return mass


def intra_terms(features: Array, shares: Array, centers: Array, weight: Array) -> Array:
    """The summands of Eq. 2, times their weights."""
    terms = np.zeros(len(features))
    for i in range(len(features)):
        for j in range(len(centers)):
            if shares[i, j] != 0:
                terms[i] += shares[i, j] * weight[j] * (1 - similarity(features[i], centers[j]))
    return terms


def inter(centers: Array) -> float:
    """Eq. 3."""
    num_classes = len(centers)
    total = 0.0
    for k in range(num_classes):
        for j in range(num_classes):
            if j != k:
                total += cosine(centers[k], centers[j]) + 1
    return total / (2 * num_classes * (num_classes - 1))


def intra_loss(
    features: Array, shares: Array, centers: Array, weight: Array, reduction: str
) -> Array:
    """Eq. 2, alone."""
    terms = intra_terms(features, shares, centers, weight)
    return _reduce(terms, masses(shares, weight), 0.0, reduction)


def separate_loss(
    features: Array, shares: Array, centers: Array, weight: Array, reduction: str
) -> Array:
    """Eq. 4."""
    terms = intra_terms(features, shares, centers, weight)
    return _reduce(terms, masses(shares, weight), inter(centers), reduction)


def _reduce(terms: Array, mass: Array, inter_loss: float, reduction: str) -> Array:
    if reduction == "none":
        return terms + mass * inter_loss
    if reduction == "sum":
        return np.asarray(terms.sum() + mass.sum() * inter_loss)
    return np.asarray((terms.sum() / mass.sum() if mass.sum() > 0 else 0.0) + inter_loss)


def derivative(of: Array, along: Array) -> Array:
    """The derivative of cos(of, along) for `of`, as it stands in Eq. 5, 6 and 7."""
    a, b = float(np.linalg.norm(of)), float(np.linalg.norm(along))
    if a == 0 or b == 0:
        return np.zeros_like(of)
    return along / (a * b) - (of @ along) * of / (a**3 * b)


def features_gradient(features: Array, shares: Array, centers: Array, weight: Array) -> Array:
    """Eq. 5; the mean under weights in place of 1/m."""
    gradient = np.zeros_like(features)
    mass = masses(shares, weight).sum()
    for i in range(len(features)):
        for j in range(len(centers)):
            if shares[i, j] * weight[j] != 0:
                pull = derivative(features[i], centers[j])
                gradient[i] -= shares[i, j] * weight[j] / (2 * mass) * pull
    return gradient


def intra_direction(features: Array, shares: Array, centers: Array) -> Array:
    """Eq. 6."""
    direction = np.zeros_like(centers)
    samples = shares.sum()
    for j in range(len(centers)):
        count = shares[:, j].sum()
        for i in range(len(features)):
            if shares[i, j] != 0:
                pull = shares[i, j] * derivative(centers[j], features[i])
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
    shares: Array,
    centers: Array,
    center_lr: float | None,
    separation: str = "mean",
) -> Array:
    """Eq. 8 with alpha as given or as `rate` has it."""
    intra = intra_direction(features, shares, centers)
    apart = inter_direction(centers) if separation == "mean" else square_direction(centers)
    alpha = rate(shares, len(centers)) if center_lr is None else center_lr
    return centers - alpha * (intra + apart)


def rate(shares: Array, num_classes: int) -> float:
    """A tenth of the samples, of one at least, up to twice the sum that Eq. 7 takes to zero."""
    return float(min(0.1 * (shares.sum() or 1), 4 * (num_classes - 1)))


def square(centers: Array) -> float:
    """The mean squared distance of each pair's cosine from the simplex, over the greatest."""
    num_classes = len(centers)
    a = 1 / (num_classes - 1)
    total = 0.0
    for k in range(num_classes):
        for j in range(num_classes):
            if j != k and centers[k].any() and centers[j].any():
                total += (cosine(centers[k], centers[j]) + a) ** 2
    return total / (num_classes * (num_classes - 1) * (1 + a) ** 2)


def square_direction(centers: Array) -> Array:
    """Half of the gradient of `square`."""
    num_classes = len(centers)
    a = 1 / (num_classes - 1)
    direction = np.zeros_like(centers)
    for j in range(num_classes):
        for k in range(num_classes):
            if k != j and centers[k].any() and centers[j].any():
                push = 2 * (cosine(centers[j], centers[k]) + a) * derivative(centers[j], centers[k])
                direction[j] += push / (num_classes * (num_classes - 1) * (1 + a) ** 2)
    return direction


def centers_gradient(features: Array, shares: Array, centers: Array) -> Array:
    """The gradient of Eq. 4 for the centers: Eq. 6 without 1 + n_j, and Eq. 7 twice."""
    intra = intra_direction(features, shares, centers)
    for j in range(len(centers)):
        intra[j] *= 1 + shares[:, j].sum()
    return intra + 2 * inter_direction(centers)


def class_centers(features: Array, target: NDArray[np.int64], num_classes: int) -> Array:
    centers = np.full((num_classes, features.shape[1]), np.nan)
    for j in range(num_classes):
        members = [features[i] for i in range(len(features)) if target[i] == j]
        if members:
            centers[j] = sum(members) / len(members)
    return centers


def intra_class_similarity(features: Array, target: NDArray[np.int64], centers: Array) -> Array:
    """Mean plain cosine of each class's features to its center."""
    figures = np.full(len(centers), np.nan)
    for j in range(len(centers)):
        members = [cosine(features[i], centers[j]) for i in range(len(features)) if target[i] == j]
        if members:
            figures[j] = sum(members) / len(members)
    return figures


def inter_class_similarity(centers: Array) -> Array:
    """Mean plain cosine of each center to the others; centers of NaN are absent."""
    present = [j for j in range(len(centers)) if not np.isnan(centers[j]).any()]
    figures = np.full(len(centers), np.nan)
    if len(present) > 1:
        for j in present:
            others = [cosine(centers[j], centers[k]) for k in present if k != j]
            figures[j] = sum(others) / len(others)
    return figures
