"""Invalid arguments raise an error that names the argument, and change nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from separate_loss import SeparateLoss, metrics, separate_loss
from separate_loss import functional as F

NUM_CLASSES, FEATURE_DIM = 5, 4

FEATURES = torch.randn(3, FEATURE_DIM)
TARGET = torch.tensor([0, 1, 2])
CENTERS = torch.randn(NUM_CLASSES, FEATURE_DIM)
META = torch.device("meta")

# Argument, invalid value, error, and a pattern of its message.
BAD_BATCHES: list[tuple[str, Any, type[Exception], str]] = [
    ("features", [1.0], TypeError, "features must be a tensor, got list"),
    ("features", FEATURES.long(), TypeError, "features must be floating point, got torch.int64"),
    (
        "features",
        FEATURES.to(torch.complex64),
        TypeError,
        "features must be floating point, got .*complex",
    ),
    (
        "features",
        torch.tensor(1.0),
        ValueError,
        r"features must have shape \(\*, d\), got a scalar",
    ),
    (
        "features",
        torch.randn(3, 7),
        ValueError,
        r"features must have 4 values .* got shape \(3, 7\)",
    ),
    ("features", FEATURES.to(META), ValueError, "target must be on meta"),
    ("target", [0, 1, 2], TypeError, "target must be a tensor, got list"),
    ("target", TARGET.bool(), TypeError, "target must hold class indices .* got torch.bool"),
    (
        "target",
        TARGET.to(torch.complex64),
        TypeError,
        "target must hold class indices .* got .*complex",
    ),
    (
        "target",
        TARGET[:2],
        ValueError,
        r"target of class indices must have shape \(3,\).* got \(2,\)",
    ),
    ("target", TARGET[:, None], ValueError, r"must have shape \(3,\).* got \(3, 1\)"),
    (
        "target",
        torch.rand(3),
        ValueError,
        r"class probabilities must have shape \(3, 5\).* got \(3,\)",
    ),
    ("target", torch.rand(3, 6), ValueError, r"must have shape \(3, 5\).* got \(3, 6\)"),
    ("target", TARGET.to(META), ValueError, "target must be on cpu, as features is, got meta"),
    ("target", torch.tensor([0, 5, 1]), IndexError, r"target .* in \[0, 5\).* got 5"),
    ("target", torch.tensor([0, 1, -1]), IndexError, r"target .* in \[0, 5\).* got -1"),
    ("target", torch.tensor([-100, 9, 1]), IndexError, r"ignore_index \(-100\), got 9"),
]

BAD_CENTERS: list[tuple[str, Any, type[Exception], str]] = [
    ("centers", None, TypeError, "centers must be a tensor, got NoneType"),
    ("centers", CENTERS.int(), TypeError, "centers must be floating point, got torch.int32"),
    ("centers", CENTERS[0], ValueError, r"centers must have shape \(C, d\), got \(4,\)"),
    ("centers", CENTERS[None], ValueError, r"centers must have shape \(C, d\), got \(1, 5, 4\)"),
    ("centers", CENTERS[:1], ValueError, r"at least 2 classes .* got shape \(1, 4\)"),
    (
        "centers",
        CENTERS[:, :0],
        ValueError,
        r"at least 2 classes and 1 feature, got shape \(5, 0\)",
    ),
    ("centers", CENTERS.to(META), ValueError, "features must be on meta, as centers is, got cpu"),
]

BAD_OPTIONS: list[tuple[str, Any, type[Exception], str]] = [
    ("weight", [1.0] * 5, TypeError, "weight must be a tensor, got list"),
    ("weight", torch.ones(5).long(), TypeError, "weight must be floating point, got torch.int64"),
    ("weight", torch.ones(4), ValueError, r"weight must have shape \(5,\).* got \(4,\)"),
    ("weight", torch.tensor([1.0, 1, 1, 1, -1]), ValueError, "weight must not be negative"),
    ("weight", torch.full((5,), torch.nan), ValueError, "weight must not be negative or NaN"),
    ("weight", torch.ones(5, device="meta"), ValueError, "weight must be on cpu"),
    ("ignore_index", 1.5, TypeError, "ignore_index must be an int, got float"),
    ("ignore_index", None, TypeError, "ignore_index must be an int, got NoneType"),
    ("reduction", "avg", ValueError, "reduction must be one of 'none', 'mean', 'sum', got 'avg'"),
    ("reduction", None, ValueError, "reduction must be one of .* got None"),
]

BAD_RATES: list[tuple[str, Any, type[Exception], str]] = [
    ("center_lr", -0.1, ValueError, "center_lr must be finite and not negative, got -0.1"),
    ("center_lr", float("nan"), ValueError, "center_lr must be finite"),
    ("center_lr", float("inf"), ValueError, "center_lr must be finite"),
    ("center_lr", "1", TypeError, "center_lr must be a float, got str"),
    ("center_lr", True, TypeError, "center_lr must be a float, got bool"),
]


def parameters(cases: list[tuple[str, Any, type[Exception], str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("name", "value", "error", "message"), cases)


@pytest.mark.parametrize("function", [separate_loss, F.intra_class_loss])
@parameters(BAD_BATCHES + BAD_CENTERS + BAD_OPTIONS)
def test_losses_refuse_invalid_arguments(
    function: Any, name: str, value: Any, error: type[Exception], message: str
) -> None:
    arguments = {"features": FEATURES, "target": TARGET, "centers": CENTERS} | {name: value}
    with pytest.raises(error, match=message):
        function(**arguments)


@parameters(BAD_BATCHES + BAD_CENTERS + BAD_OPTIONS[6:8] + BAD_RATES)
def test_update_centers_refuses_invalid_arguments(
    name: str, value: Any, error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"features": FEATURES, "target": TARGET, "centers": CENTERS}
    arguments |= {"center_lr": 1.0} | {name: value}
    before = CENTERS.clone()
    with pytest.raises(error, match=message):
        F.update_centers(**arguments)
    assert torch.equal(CENTERS, before)


@parameters(BAD_CENTERS[:-1])
def test_inter_class_loss_refuses_invalid_centers(
    name: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        F.inter_class_loss(**{name: value})


@pytest.mark.parametrize(
    ("a", "b", "error", "message"),
    [
        (1.0, CENTERS, TypeError, "a must be a tensor, got float"),
        (CENTERS, CENTERS.long(), TypeError, "b must be floating point, got torch.int64"),
        (CENTERS, torch.tensor(1.0), ValueError, r"b must have shape \(\*, d\), got a scalar"),
        (CENTERS, torch.rand(5, 3), ValueError, r"b must have 4 values .* got shape \(5, 3\)"),
        (
            CENTERS,
            torch.rand(3, 4),
            ValueError,
            r"b must .* broadcasts with \(5, 4\), got \(3, 4\)",
        ),
        (CENTERS, CENTERS.to(META), ValueError, "b must be on cpu, as a is, got meta"),
    ],
)
def test_similarity_refuses_invalid_vectors(
    a: Any, b: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        F.similarity(a, b)


@pytest.mark.parametrize("center_init", ["features", "sphere"])
@parameters([case for case in BAD_BATCHES if case[1] is not FEATURES])
def test_the_module_refuses_invalid_batches(
    center_init: Any, name: str, value: Any, error: type[Exception], message: str
) -> None:
    criterion = SeparateLoss(NUM_CLASSES, FEATURE_DIM, center_init=center_init)
    before = criterion.centers.clone()
    with pytest.raises(error, match=message):
        criterion(**({"features": FEATURES, "target": TARGET} | {name: value}))
    assert torch.equal(criterion.centers, before)
    assert criterion.last_terms is None


@parameters(
    [
        ("num_classes", 1, ValueError, "num_classes must be at least 2, got 1"),
        ("num_classes", 3.0, TypeError, "num_classes must be an int, got float"),
        ("num_classes", True, TypeError, "num_classes must be an int, got bool"),
        ("feature_dim", 0, ValueError, "feature_dim must be at least 1, got 0"),
        ("feature_dim", "4", TypeError, "feature_dim must be an int, got str"),
        (
            "center_update",
            "sgd",
            ValueError,
            "center_update must be one of 'forward', .* got 'sgd'",
        ),
        ("center_init", "zeros", ValueError, "center_init must be one of .* got 'zeros'"),
        ("center_init", CENTERS[:3], ValueError, r"center_init .* \(5, 4\), got \(3, 4\)"),
        ("center_init", CENTERS.long(), TypeError, "center_init must be floating point"),
        ("weight", torch.ones(4), ValueError, r"weight must have shape \(5,\).* got \(4,\)"),
        *BAD_OPTIONS[6:],
        *BAD_RATES,
    ]
)
def test_the_module_refuses_invalid_options(
    name: str, value: Any, error: type[Exception], message: str
) -> None:
    arguments = {"num_classes": NUM_CLASSES, "feature_dim": FEATURE_DIM} | {name: value}
    with pytest.raises(error, match=message):
        SeparateLoss(**arguments)


@pytest.mark.parametrize("center_update", ["gradient", "none"])
def test_center_init_features_needs_the_forward_update(center_update: Any) -> None:
    with pytest.raises(ValueError, match="center_init='features' needs center_update='forward'"):
        SeparateLoss(5, 4, center_update=center_update, center_init="features")


def test_checkpoints_of_another_size_are_refused() -> None:
    criterion = SeparateLoss(5, 4, center_init="sphere")
    before = criterion.centers.clone()
    with pytest.raises(RuntimeError, match="size mismatch for centers"):
        criterion.load_state_dict(SeparateLoss(6, 4).state_dict())
    assert torch.equal(criterion.centers, before)


@parameters(
    [
        *[case for case in BAD_BATCHES if case[0] == "target" or case[3].startswith("features")],
        ("target", torch.rand(3, 5), TypeError, "target must hold class indices, got .*float"),
    ]
)
def test_metrics_refuse_invalid_batches(
    name: str, value: Any, error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"features": FEATURES, "target": TARGET} | {name: value}
    statistics = metrics.ClassStatistics(NUM_CLASSES, FEATURE_DIM)
    with pytest.raises(error, match=message):
        statistics.update(**arguments)
    assert not statistics.counts.any()
    assert not statistics.sums.any()
    if value.shape[-1:] != (7,) if isinstance(value, Tensor) else True:
        with pytest.raises(error, match=message):
            metrics.class_centers(**arguments, num_classes=NUM_CLASSES)


def test_metrics_refuse_invalid_centers() -> None:
    with pytest.raises(ValueError, match=r"true_centers must have shape \(5, 4\), got \(4, 4\)"):
        metrics.center_agreement(CENTERS, CENTERS[:4])
    with pytest.raises(ValueError, match="at least 2 classes"):
        metrics.inter_class_similarity(CENTERS[:1])
    with pytest.raises(ValueError, match="reduction must be one of 'none', 'mean', got 'sum'"):
        metrics.inter_class_similarity(CENTERS, reduction="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"centers must have shape \(5, 7\), got \(5, 4\)"):
        metrics.intra_class_similarity(torch.rand(3, 7), TARGET, CENTERS)
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        metrics.class_centers(FEATURES, TARGET, 1)
