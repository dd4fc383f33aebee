"""Layouts of logits: classes last or in dimension 1, for vectors, sequences and maps."""

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from separate_loss import SoftmaxSeparateLoss, separate_loss
from separate_loss.functional import update_centers
from tests.helpers.properties import property_test

NUM_CLASSES, FEATURE_DIM = 4, 6
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Transposed(nn.Module):
    """A linear layer over dimension 1; the loss cannot see that from its type."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURE_DIM, NUM_CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.linear(features.movedim(1, -1))
        return logits.movedim(-1, 1)


def joint_loss(
    features: Tensor,
    logits: Tensor,
    target: Tensor,
    centers: Tensor,
    *,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """The joint loss of samples in rows, written with the plain functions."""
    kept = target != ignore_index
    features, logits, target = features[kept], logits[kept], target[kept]
    softmax = F.cross_entropy(logits, target, weight=weight, label_smoothing=label_smoothing)
    probabilities = F.one_hot(target, NUM_CLASSES).to(features.dtype)
    probabilities = (1 - label_smoothing) * probabilities + label_smoothing / NUM_CLASSES
    return softmax + separate_loss(features, probabilities, centers, weight=weight)


def rows(values: Tensor, class_dim: int) -> Tensor:
    values = values.movedim(class_dim, -1)
    return values.reshape(-1, values.shape[-1])


@property_test(
    kind=st.sampled_from(["linear", "transposed", *CONVOLUTIONS]),
    sizes=st.lists(st.sampled_from([1, 2, NUM_CLASSES, FEATURE_DIM]), min_size=3, max_size=3),
    num_samples=st.sampled_from([1, 3, NUM_CLASSES, FEATURE_DIM]),
    ignored=st.floats(0, 0.5),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    weighted=st.booleans(),
    given_features=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_every_layout_equals_samples_in_rows(
    kind: Any,
    sizes: list[int],
    num_samples: int,
    ignored: float,
    label_smoothing: float,
    weighted: bool,
    given_features: bool,
    seed: int,
) -> None:
    """Also where numbers of samples, classes and features are equal."""
    torch.manual_seed(seed)
    places = sizes[: kind if isinstance(kind, int) else 2]
    options: dict[str, Any] = {"ignore_index": 255, "label_smoothing": label_smoothing}
    class_dim = -1 if kind == "linear" else 1
    if kind == "linear":
        head: nn.Module = nn.Linear(FEATURE_DIM, NUM_CLASSES)
        features = torch.randn(num_samples, *places, FEATURE_DIM, dtype=torch.float64)
    else:
        features = torch.randn(num_samples, FEATURE_DIM, *places, dtype=torch.float64)
        head = Transposed()
        if kind != "transposed":
            head = CONVOLUTIONS[kind](FEATURE_DIM, NUM_CLASSES, 1)
    if given_features or kind == "transposed":
        options["class_dim"] = class_dim
    head.double()
    target = torch.randint(NUM_CLASSES, (num_samples, *places))
    target[torch.rand(target.shape) < ignored] = 255
    target.view(-1)[0] = 0
    centers = F.normalize(torch.randn(NUM_CLASSES, FEATURE_DIM, dtype=torch.float64), dim=-1)
    weight = torch.rand(NUM_CLASSES).double() + 0.1 if weighted else None
    criterion = SoftmaxSeparateLoss(
        head, center_init=centers, dtype=torch.float64, weight=weight, **options
    )

    leaf = features.clone().requires_grad_()
    extra = {"features": leaf} if given_features else {}
    try:
        loss = criterion(head(leaf), target, **extra)
    except ValueError as refusal:
        # Only the type of a head can tell that it moved no dimension.
        assert "watch the linear layer or convolution" in str(refusal)  # noqa: PT017
        assert kind == "transposed"
        assert not given_features
        numbers = [size for size in target.shape if size != 1]
        assert len({*numbers}) < len(numbers) or places[-1] in (NUM_CLASSES, FEATURE_DIM)
        return
    options.pop("class_dim", None)
    twin = features.clone().requires_grad_()
    samples = rows(twin, class_dim)
    expected = joint_loss(
        samples, rows(head(twin), class_dim), target.flatten(), centers, weight=weight, **options
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, [leaf, *head.parameters()]),
        torch.autograd.grad(expected, [twin, *head.parameters()]),
    )
    kept = target.flatten() != 255
    moved = update_centers(samples.detach()[kept], target.flatten()[kept], centers)
    torch.testing.assert_close(criterion.separate.centers, moved)


@pytest.mark.parametrize("dims", CONVOLUTIONS)
@pytest.mark.parametrize("num_samples", [NUM_CLASSES, 5])
def test_a_flattened_convolution_is_a_head(dims: int, num_samples: int) -> None:
    """As in ResNetV2 and DLA of timm, whose last map has size 1."""
    head = CONVOLUTIONS[dims](FEATURE_DIM, NUM_CLASSES, 1)
    model = nn.Sequential(head, nn.Flatten(1))
    features = torch.randn(num_samples, FEATURE_DIM, *[1] * dims, requires_grad=True)
    target = torch.arange(num_samples) % NUM_CLASSES
    criterion = SoftmaxSeparateLoss(head, center_init="sphere")
    centers = criterion.separate.centers.clone()
    logits = model(features)
    expected = F.cross_entropy(logits, target) + separate_loss(features.flatten(1), target, centers)
    torch.testing.assert_close(criterion(logits, target), expected)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_reductions_keep_the_shape_of_the_target(reduction: Any) -> None:
    head = nn.Conv2d(FEATURE_DIM, NUM_CLASSES, 1)
    criterion = SoftmaxSeparateLoss(head, reduction=reduction, ignore_index=255)
    target = torch.randint(NUM_CLASSES, (2, 3, 5))
    features = torch.randn(2, FEATURE_DIM, 3, 5, requires_grad=True)
    loss = criterion(head(features), target)
    assert loss.shape == (target.shape if reduction == "none" else ())


def test_probabilities_have_the_layout_of_the_logits() -> None:
    head = nn.Conv1d(FEATURE_DIM, NUM_CLASSES, 1)
    criterion = SoftmaxSeparateLoss(head, center_init="sphere", center_update="none")
    features = torch.randn(3, FEATURE_DIM, NUM_CLASSES, requires_grad=True)
    target = torch.rand(3, NUM_CLASSES, NUM_CLASSES).softmax(1)
    logits = head(features)
    expected = F.cross_entropy(logits, target) + separate_loss(
        rows(features, 1), rows(target, 1), criterion.separate.centers
    )
    torch.testing.assert_close(criterion(logits, target), expected)


@pytest.mark.parametrize(
    ("head", "features", "target", "expected"),
    [
        (nn.Conv2d(6, 4, 1), (2, 6, 3, 5), (2, 5, 3), r"\(2, 3, 5\).*got .*\(2, 5, 3\)"),
        (nn.Conv2d(6, 4, 1), (2, 6, 3, 5), (2, 4, 3, 5), r"\(2, 3, 5\).*got .*\(2, 4, 3, 5\)"),
        (nn.Linear(6, 4), (2, 3, 6), (2, 4), r"\(2, 3\).*got .*\(2, 4\)"),
    ],
)
def test_targets_of_another_shape_are_refused(
    head: nn.Module, features: tuple[int, ...], target: tuple[int, ...], expected: str
) -> None:
    criterion = SoftmaxSeparateLoss(head)
    with pytest.raises(ValueError, match=expected):
        criterion(head(torch.randn(features)), torch.zeros(target, dtype=torch.int64))


@pytest.mark.parametrize("class_dim", [None, 1, -1])
@pytest.mark.parametrize("length", [7, NUM_CLASSES, FEATURE_DIM])
def test_heads_that_move_dimensions_are_refused(class_dim: Any, length: int) -> None:
    """The error points to the layer inside, which is accepted."""

    class Moving(nn.Module):
        def __init__(self, first: int, second: int) -> None:
            super().__init__()
            self.dims, self.linear = (first, second), nn.Linear(FEATURE_DIM, NUM_CLASSES)

        def forward(self, features: Tensor) -> Tensor:
            logits: Tensor = self.linear(features.transpose(*self.dims))
            return logits

    for dims, sizes in (
        ((1, 2), (3, FEATURE_DIM, length)),
        ((0, 1), (length, length, FEATURE_DIM)),
    ):
        head = Moving(*dims)
        criterion = SoftmaxSeparateLoss(head, class_dim=class_dim)
        features = torch.randn(sizes, requires_grad=True)
        logits = head(features)
        target = torch.zeros(logits.shape[:-1], dtype=torch.int64)
        with pytest.raises(ValueError, match="watch the"):
            criterion(logits, target)
        SoftmaxSeparateLoss(head.linear)(head(features), target)


@pytest.mark.parametrize("given", [False, True])
def test_given_features_that_fit_both_layouts_need_the_class_dimension(given: bool) -> None:
    head = nn.Linear(FEATURE_DIM, NUM_CLASSES)
    features = torch.randn(3, FEATURE_DIM, FEATURE_DIM, requires_grad=True)
    target = torch.randint(NUM_CLASSES, (3, FEATURE_DIM))
    if given:
        criterion = SoftmaxSeparateLoss(
            head, class_dim=-1, center_update="none", center_init="sphere"
        )
        logits = head(features)
        torch.testing.assert_close(
            criterion(logits, target, features=features), criterion(logits, target)
        )
        return
    criterion, logits = SoftmaxSeparateLoss(head), head(features)
    with pytest.raises(ValueError, match=r"features of shape \(3, 6, 6\) fit .*pass class_dim"):
        criterion(logits, target, features=features)
    square = torch.randn(3, NUM_CLASSES, FEATURE_DIM)
    with pytest.raises(ValueError, match=r"logits of shape \(3, 4, 4\) fit .*pass class_dim"):
        criterion(head(square).mT, target[:, :NUM_CLASSES], features=square)
