"""Invalid arguments raise an error that names the argument, and change nothing."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from separate_loss import SeparateLoss, SoftmaxSeparateLoss, metrics, separate_loss
from separate_loss import functional as F
from separate_loss._checks import warn_probabilities

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


CALLS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "function": lambda features, target: separate_loss(features, target, CENTERS),
    "intra": lambda features, target: F.intra_class_loss(features, target, CENTERS),
    "update": lambda features, target: F.update_centers(features, target, CENTERS, center_lr=1.0),
    "module": SeparateLoss(NUM_CLASSES, FEATURE_DIM),
    "class_centers": lambda features, target: metrics.class_centers(features, target, NUM_CLASSES),
    "intra_class_similarity": lambda features, target: metrics.intra_class_similarity(
        features, target, CENTERS
    ),
    "ClassStatistics": lambda features, target: metrics.ClassStatistics(
        NUM_CLASSES, FEATURE_DIM
    ).update(features, target),
}
ALL_CALLS = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def two_lines(features: Tensor, target: Tensor) -> object:
    head = torch.nn.Linear(FEATURE_DIM, NUM_CLASSES)
    criterion = SoftmaxSeparateLoss(head)
    return criterion(head(features.float()), target)


@pytest.mark.parametrize(
    "call", [*CALLS.values(), two_lines], ids=[*CALLS.keys(), "SoftmaxSeparateLoss"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_labels_of_a_floating_type_are_told_apart_from_probabilities(
    call: Callable[[Tensor, Tensor], object], dtype: torch.dtype
) -> None:
    for labels, shape in ((TARGET.to(dtype), r"\(3,\)"), (TARGET.to(dtype)[:, None], r"\(3, 1\)")):
        with pytest.raises(
            ValueError,
            match=rf"probabilities must have shape \(3, 5\) .* got {shape}; class indices need "
            r"target\.long\(\)",
        ):
            call(FEATURES, labels)
    with pytest.raises(TypeError, match=r"got torch.bool; class indices need target\.long\(\)"):
        call(FEATURES, TARGET.bool())


def test_labels_of_maps_of_a_floating_type_need_long_too() -> None:
    head = torch.nn.Conv2d(3, NUM_CLASSES, 1)
    criterion = SoftmaxSeparateLoss(head)
    logits = head(torch.randn(2, 3, 6, 7))
    for target in (torch.zeros(2, 6, 7), torch.zeros(2, 6, 7, 1)):
        with pytest.raises(ValueError, match=r"class indices need target\.long\(\)"):
            criterion(logits, target)


@ALL_CALLS
@pytest.mark.parametrize(
    ("features", "target", "advice"),
    [
        ((2, 4, 6, 7), (2, 6, 7), "need features.movedim(1, -1)"),
        ((2, 4, 6), (2, 6), "need features.movedim(1, -1)"),
        ((2, 4, 3, 6, 7), (2, 3, 6, 7), "need features.movedim(1, -1)"),
        ((2, 4, 6, 4), (2, 6, 4), "need features.movedim(1, -1)"),
        ((3, 4, 6, 4), (3, 4, 6), "need features.movedim(1, -1)"),
        ((2, 4, 1, 1), (2,), "needs features.flatten(1)"),
        ((2, 4, 1), (2,), "needs features.flatten(1)"),
        ((2, 4, 6, 7), (2,), "needs features.flatten(1) after pooling"),
        ((2, 4, 1, 1), (2, 1, 1), "need features.movedim(1, -1)"),
        # Either order fits.
        ((2, 4, 4, 4), (2, 4, 4), "may be (N, *, d) or (N, d, *); pass features.movedim(1, -1)"),
        ((2, 4, 4, 4, 4), (2, 4, 4, 4), "may be (N, *, d) or (N, d, *)"),
    ],
)
def test_maps_with_features_in_dimension_1_are_told_from_others(
    call: Callable[[Tensor, Tensor], object],
    features: tuple[int, ...],
    target: tuple[int, ...],
    advice: str,
) -> None:
    if features[-1] == FEATURE_DIM and target == features[:-1] and len({*features[1:]}) > 1:
        call(torch.randn(features), torch.zeros(target, dtype=torch.long))  # samples of 4 features
        return
    with pytest.raises(ValueError, match=re.escape(advice)):
        call(torch.randn(features), torch.zeros(target, dtype=torch.long))


@pytest.mark.parametrize(
    ("features", "target", "advice"),
    [
        ((2, 4, 6, 7), (2, 5, 6, 7), "features.movedim(1, -1), and target.movedim(1, -1)"),
        ((2, 4, 6, 7), (2, 6, 7, 5), "need features.movedim(1, -1)"),
        ((2, 4, 1, 1), (2, 5), "needs features.flatten(1)"),
    ],
)
def test_maps_beside_probabilities_are_told_too(
    features: tuple[int, ...], target: tuple[int, ...], advice: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(advice)):
        separate_loss(torch.randn(features), torch.rand(target), CENTERS)


@ALL_CALLS
def test_advice_for_maps_helps(call: Callable[[Tensor, Tensor], object]) -> None:
    """Also where shapes fit both orders, by the order in memory or without other dimensions."""
    target = torch.randint(NUM_CLASSES, (2, 4, 4))
    maps = torch.randn(2, 4, 4, 4)
    for one in (maps, maps.to(memory_format=torch.channels_last)):
        with pytest.raises(ValueError, match="may be"):
            call(one, target)
        call(one.movedim(1, -1).flatten(0, -2), target.flatten())
    call(maps.movedim(1, -1), target)
    for refused in (maps.movedim(1, -1).contiguous(), maps.transpose(1, 2), maps.transpose(2, 3)):
        with pytest.raises(ValueError, match="may be"):
            call(refused, target)
    call(torch.randn(2, 4, 6, 7).movedim(1, -1), torch.zeros(2, 6, 7, dtype=torch.long))
    call(torch.randn(2, 4, 1, 1).flatten(1), torch.zeros(2, dtype=torch.long))
    # Sequences as long as features are wide, and maps of other sizes.
    shapes: list[tuple[int, ...]] = [
        (2, 4, 4),
        (2, 4, 6, 4),
        (2, 6, 4, 4),
        (2, 6, 6, 4),
        (4, 4),
        (4,),
    ]
    for shape in shapes:
        call(torch.randn(shape), torch.zeros(shape[:-1], dtype=torch.long))


def test_nearest_center_refuses_maps_with_features_in_dimension_1() -> None:
    for shape, advice in (
        ((2, 4, 6, 7), "features (N, d, *) need features.movedim(1, -1)"),
        ((2, 4, 1, 1), "features (N, d, *) need features.flatten(1)"),
        ((2, 4, 6, 4), "may be (N, *, d) or (N, d, *); pass features.movedim(1, -1)"),
    ):
        with pytest.raises(ValueError, match=re.escape(advice)):
            metrics.nearest_center(torch.randn(shape), CENTERS)
    for view in (torch.randn(2, 4, 4, 6).movedim(1, -1), torch.randn(2, 4, 6, 4).movedim(1, -1)):
        assert metrics.nearest_center(view, CENTERS).shape == view.shape[:-1]
    sequences, others = (2, 4, 4), (2, 6, 6, 4)
    for samples in (torch.randn(sequences), torch.randn(others)):
        assert metrics.nearest_center(samples, CENTERS).shape == samples.shape[:-1]


@pytest.mark.parametrize("class_dim", [1, -1])
@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
def test_maps_of_d_by_d_pixels_have_no_second_reading_beside_a_head(
    class_dim: Any, reduction: Any
) -> None:
    head: torch.nn.Module = torch.nn.Linear(4, 5) if class_dim == -1 else torch.nn.Conv2d(4, 5, 1)
    criterion = SoftmaxSeparateLoss(head, reduction=reduction)
    target = torch.randint(NUM_CLASSES, (2, 4, 4))
    for layout in (torch.contiguous_format, torch.channels_last):
        features = torch.randn(2, 4, 4, 4).to(memory_format=layout).requires_grad_()
        loss = criterion(head(features), target)
        assert loss.shape == (target.shape if reduction == "none" else ())
        last = features.movedim(1, -1) if class_dim == 1 else features
        flat = SeparateLoss(NUM_CLASSES, FEATURE_DIM).eval()
        flat.centers.copy_(criterion.separate.centers)
        flat(last.flatten(0, -2), target.flatten())
        assert criterion.eval()(head(features), target).isfinite().all()
        assert criterion.last_terms is not None
        assert flat.last_terms is not None
        torch.testing.assert_close(criterion.last_terms.intra, flat.last_terms.intra)
        criterion.train()


def test_one_logit_is_told_to_use_two_classes() -> None:
    advice = r"SeparateLoss\(2, feature_dim\) beside the binary loss"
    for call in (
        lambda: SeparateLoss(1, 16),
        lambda: SoftmaxSeparateLoss(torch.nn.Linear(16, 1)),
        lambda: SoftmaxSeparateLoss(torch.nn.Linear(16, 1), num_classes=1),
        lambda: SoftmaxSeparateLoss(torch.nn.Linear(16, 1), num_classes=2),
        lambda: SoftmaxSeparateLoss(torch.nn.Conv2d(16, 1, 1), num_classes=2),
    ):
        with pytest.raises(ValueError, match=f"num_classes must be at least 2, got 1; .*{advice}"):
            call()
    with pytest.raises(ValueError, match="num_classes must be 3, as in the head, or None, got 2"):
        SoftmaxSeparateLoss(torch.nn.Linear(16, 3), num_classes=2)


def test_a_loss_on_another_device_is_told_how_it_moves() -> None:
    criterion = SeparateLoss(NUM_CLASSES, FEATURE_DIM, device="meta")
    with pytest.raises(
        ValueError,
        match=r"features must be on meta, as centers is, got cpu; .* criterion\.to\('cpu'\)",
    ):
        criterion(FEATURES, TARGET)


PROBABILITIES = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_classes", [2, 7, 1000])
def test_class_probabilities_of_each_type_pass_without_a_warning(
    num_classes: int, dtype: torch.dtype
) -> None:
    for scale in (0.1, 1.0, 30.0):
        drawn = (torch.randn(200, num_classes) * scale).to(dtype).softmax(-1)
        one_hot = torch.eye(num_classes, dtype=dtype)[torch.randint(num_classes, (200,))]
        for target in (
            drawn,
            one_hot,
            0.3 * drawn + 0.7 * one_hot,
            0.9 * one_hot + 0.1 / num_classes,
        ):
            assert warn_probabilities(target)
            assert warn_probabilities(target.requires_grad_().unflatten(0, (2, -1)))
    assert warn_probabilities(PROBABILITIES.to(dtype))
    if dtype == torch.float16:  # of a teacher
        assert warn_probabilities(drawn.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("row", "least", "total"),
    [
        ([1.0, 1.0, 0.0], "0", "2"),
        ([-1.0, 1.0, 1.0], "-1", "1"),
        ([-1.0, 1.0, -1.0], "-1", "-1"),
        ([0.5, 0.0, 0.0], "0", "0.5"),
        ([8.0, -4.0, -3.0], "-4", "1"),
        ([0.5, -0.5, 0.0], "-0.5", "0"),
        ([float("nan"), 0.0, 1.0], "nan", "nan"),
    ],
    ids=["several labels", "signs", "more signs", "half", "logits", "balanced", "NaN"],
)
def test_other_rows_get_one_warning(
    row: list[float], least: str, total: str, dtype: torch.dtype
) -> None:
    target = PROBABILITIES.to(dtype, copy=True)
    target[1] = torch.tensor(row)
    message = f"least value {re.escape(least)} and the sum {re.escape(total)}"
    for shaped in (target, target[None], target[1]):
        with pytest.warns(UserWarning, match=message) as caught:
            assert warn_probabilities(shaped)
        assert len(caught) == 1


def test_what_holds_no_probabilities_is_not_looked_at() -> None:
    target = torch.full((4, 3), 2.0)
    looked = [warn_probabilities(value) for value in (TARGET, target.to(META), target[:0])]
    seen = []

    def step(rows: Tensor) -> Tensor:
        seen.append(warn_probabilities(rows))
        return rows.sum()

    torch.func.vmap(step)(target)
    torch.compile(step, backend="eager")(target)
    assert looked + seen == [False] * 5


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
