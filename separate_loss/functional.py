"""The equations of the paper as stateless functions.

Y. Li, Y. Lu, J. Li, G. Lu, "Separate Loss for Basic and Compound Facial Expression Recognition in
the Wild", ACML 2019, PMLR 101:897-911. Equation numbers are the paper's. Shapes: N samples or any
leading dimensions `*`, C classes, d features; a hat is a vector over its norm.

All functions compute and return float32 or wider; gradients have the types of their tensors.
Vectors whose norm is below 1e-19 or above 1e19 in float32 count as zero: their cosines and
gradients are 0. Call `backward` outside of autocast regions, as PyTorch advises.
"""

import torch
from torch import Tensor

from separate_loss import _checks
from separate_loss._batch import Options, check_arguments, compute_dtype, prepare_batch
from separate_loss._centers import read_centers
from separate_loss._checks import FORMS, Form, Reduction
from separate_loss._ops import clamp_value, full_precision
from separate_loss._step import expected_centers, intra_loss, run_step
from separate_loss._terms import inter_class, normalize

__all__ = [
    "inter_class_loss",
    "intra_class_loss",
    "separate_loss",
    "similarity",
    "update_centers",
]


def similarity(a: Tensor, b: Tensor) -> Tensor:
    r"""Cosine similarity over the last dimension, shifted to [0, 1].

    $$ \operatorname{Sim}(a, b) = \frac{1}{2} \left( \hat a^T \hat b + 1 \right) \tag{1} $$

    Args:
        a, b: floating point, `(*, d)`; the leading dimensions broadcast.

    Returns:
        Similarities `(*)`; 1/2 where either vector is zero.

    Raises:
        TypeError, ValueError: an argument is no floating-point tensor, shapes do not broadcast, or
            devices differ.

    Examples:
        >>> others = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> similarity(torch.tensor([3.0, 0.0]), others)
        tensor([1.0000, 0.5000, 0.0000])
    """
    _checks.check_vectors("a", a)
    _checks.check_vectors("b", b)
    _checks.check_device("b", b, "a", a)
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"b must have {a.shape[-1]} values in the last dimension, as a has, "
            f"got shape {tuple(b.shape)}"
        )
    try:
        torch.broadcast_shapes(a.shape, b.shape)
    except RuntimeError:
        raise ValueError(
            f"b must have a shape that broadcasts with {tuple(a.shape)}, got {tuple(b.shape)}"
        ) from None
    dtype = compute_dtype(a, b)
    (a, _), (b, _) = normalize(a.to(dtype)), normalize(b.to(dtype))
    return clamp_value(((a * b).sum(-1) + 1) / 2, 0, 1)


def intra_class_loss(
    features: Tensor,
    target: Tensor,
    centers: Tensor,
    *,
    form: Form = "simplex",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""The mean dissimilarity between samples and the centers of their classes, in [0, 1].

    $$ L_{intra} = 1 - \frac{1}{2m} \sum_i \left( \hat x_i^T \hat c_{y_i} + 1 \right) \tag{2} $$

    ``form="paper"`` has the gradient of Eq. 5 for the features, and ``form="simplex"`` that
    gradient times the norm of each sample's features. Values are the same. Arguments,
    reductions and errors are those of `separate_loss`, without the inter-class term.

    Examples:
        >>> centers = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
        >>> features = torch.tensor([[1.0, 0.0], [0.0, -1.0], [1.0, 0.0]])
        >>> intra_class_loss(features, torch.tensor([0, 1, 1]), centers, reduction="none")
        tensor([0.0000, 1.0000, 0.5000])
    """
    options = Options(form, weight, ignore_index, reduction, label_smoothing)
    check_arguments(features, target, centers, options)
    with full_precision(centers.device.type):
        batch = prepare_batch(features, target, centers, options)
        statistics = read_centers(batch.centers, "paper", differentiable=True)
        loss = intra_loss(batch, expected_centers(batch, statistics))
    return loss.reshape(features.shape[:-1]) if reduction == "none" else loss


def inter_class_loss(centers: Tensor, *, form: Form = "simplex") -> Tensor:
    r"""The mean similarity between the centers of different classes.

    ``form="paper"`` is Eq. 3, in [(C - 2) / (2 (C - 1)), 1]:

    $$ L_{inter} = \frac{1}{2 C (C - 1)} \sum_k \sum_{j \ne k} (\hat c_k^T \hat c_j + 1) \tag{3} $$

    All unit centers that sum to zero reach its minimum. It takes O(C d) time. ``form="simplex"``,
    which is not in the paper, is in [0, 1]. Over the n centers that are not zero, it is 0 only if
    each pair has the cosine of a simplex, -a with a = 1 / (n - 1), and for n < 2:

    $$ Q = \frac{1}{n (n - 1) (1 + a)^2} \sum_k \sum_{j \ne k} (\hat c_k^T \hat c_j + a)^2 $$

    By a Gram matrix with min(C, d) rows, it takes O(C d min(C, d)) time.

    Args:
        centers: floating point, (C, d) with C >= 2.
        form: ``"simplex"`` or ``"paper"``.

    Returns:
        A scalar.

    Raises:
        TypeError, ValueError: `centers` is no floating-point tensor (C, d) of at least two classes,
            or `form` is unknown.

    Examples:
        >>> centers = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
        >>> inter_class_loss(centers)
        tensor(0.2500)
        >>> inter_class_loss(centers, form="paper")
        tensor(0.5000)
    """
    _checks.check_choice("form", form, FORMS)
    _checks.check_centers("centers", centers)
    centers = centers.to(compute_dtype(centers))
    with full_precision(centers.device.type):
        statistics = read_centers(centers, form, differentiable=True)
        _, _, center_sum, gram, num_centers, num_classes = statistics
        return inter_class(center_sum, gram, num_centers, num_classes)


def separate_loss(
    features: Tensor,
    target: Tensor,
    centers: Tensor,
    *,
    form: Form = "simplex",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""The separate loss: intra-class plus inter-class loss.

    $$ L_{sep} = L_{intra} + L_{inter} \tag{4} $$

    ``form="paper"`` is the loss as published. ``form="simplex"`` differs in two points: the
    gradient for each sample's features is Eq. 5 times their norm, held constant, so that the pull
    on a sample does not depend on that norm (this is not the gradient of any loss); and L_inter is
    the squared distance of the centers to a simplex, over the classes that have a center. A class
    has one unless its center is zero.

    Args:
        features: deep features, floating point, `(*, d)`. Maps `(N, d, *)` need `movedim(1, -1)`.
            Maps with d x d pixels fit both orders, so that they are refused without it.
        target: class indices, an integer type, `(*)` with values in [0, C) or `ignore_index`; or
            class probabilities, floating point, `(*, C)`: soft labels, mixup, compound labels.
        centers: floating point, (C, d) with C >= 2.
        form: ``"simplex"`` or ``"paper"``, for L_inter as in `inter_class_loss`.
        weight: class weights, floating point, (C,), not negative. A sample has the weight of its
            class, or under probabilities the mean weight of its classes.
        ignore_index: samples with this class index are ignored. Unused under probabilities.
        reduction: ``"mean"`` returns the weighted mean of L_intra over the samples, plus L_inter;
            ``"none"`` the weight of each sample times its (L_intra + L_inter), shape `(*)`;
            ``"sum"`` the sum of these. If all samples are ignored, L_intra is 0.
        label_smoothing: e in [0, 1], as in `torch.nn.functional.cross_entropy`: the target is
            (1 - e) times the given one, plus e / C for each class.

    Returns:
        A scalar, or `(*)` for ``reduction="none"``, in float32 or wider.

    Raises:
        TypeError, ValueError: an argument is of a wrong type, size, device or value.
        IndexError: a class index is out of range. On accelerators and in compiled code an assertion
            on the device fails instead, because reading the index would synchronise.

    Examples:
        >>> centers = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
        >>> features = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
        >>> separate_loss(features, torch.tensor([0, 1]), centers)
        tensor(0.7500)
        >>> separate_loss(features, torch.tensor([[1.0, 0.0], [0.5, 0.5]]), centers)
        tensor(0.6250)
        >>> separate_loss(features, torch.tensor([0, 1]), centers, form="paper")
        tensor(1.)
    """
    options = Options(form, weight, ignore_index, reduction, label_smoothing)
    return run_step(features, target, centers, options).loss


def update_centers(
    features: Tensor,
    target: Tensor,
    centers: Tensor,
    *,
    form: Form = "simplex",
    center_lr: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    r"""The centers after one step of the paper's update, which is not a gradient step on Eq. 4.

    $$
    D_{intra}(c_j) = \frac{-1}{2m (1 + n_j)} \sum_{i: y_i = j} \left(
        \frac{x_i}{\|x_i\| \|c_j\|} - \frac{(x_i^T c_j) c_j}{\|x_i\| \|c_j\|^3} \right) \tag{6}
    $$

    $$
    D_{inter}(c_j) = \frac{1}{2 C (C - 1)} \sum_{k \ne j} \left(
        \frac{c_k}{\|c_k\| \|c_j\|} - \frac{(c_k^T c_j) c_j}{\|c_k\| \|c_j\|^3} \right) \tag{7}
    $$

    $$ c_j \leftarrow c_j - \alpha \left( D_{intra}(c_j) + D_{inter}(c_j) \right) \tag{8} $$

    with n_j the number of samples of class j and m the number of all samples. Eq. 7 is half of the
    gradient of Eq. 3, and Eq. 6 is the gradient of Eq. 2 over 1 + n_j. Under class probabilities
    n_j is their sum. With ``form="simplex"``, half of the gradient of Q replaces Eq. 7. Samples
    with NaN or infinity in their features are ignored. A zero center stays zero.

    Args:
        features, target, ignore_index: as in `separate_loss`.
        centers: as there; not modified.
        form: as in `inter_class_loss`.
        center_lr: alpha, finite and not negative. None takes m / 10, so that the effect of a sample
            by Eq. 6 does not depend on the batch size, and at most 4 (C - 1), or 4 (n - 1) with the
            n centers of the simplex form: with unit centers, a larger alpha makes their sum grow by
            Eq. 7.

    Returns:
        New centers (C, d) in the type of `centers`, without a graph.

    Raises:
        TypeError, ValueError, IndexError: as in `separate_loss`, and for `center_lr`.

    Examples:
        >>> centers = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> features = torch.tensor([[1.0, 1.0]])
        >>> update_centers(features, torch.tensor([0]), centers, form="paper", center_lr=1.0)
        tensor([[ 1.0000, -0.0732],
                [-0.2500,  1.0000]])
    """
    center_lr = _checks.check_center_lr(center_lr)
    options = Options(form, ignore_index=ignore_index)
    with torch.no_grad():
        step = run_step(features, target, centers, options)
        moved = centers.clone()
        step.update_(moved, center_lr)
        return moved
