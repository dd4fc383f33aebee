"""Types, autocast, gradient scaling, and strides."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from separate_loss import SeparateLoss, separate_loss
from separate_loss import functional as F

HALVES = [torch.float16, torch.bfloat16]


def target_of(kind: str, num_samples: int, num_classes: int) -> Tensor:
    if kind == "indices":
        return torch.randint(num_classes, (num_samples,))
    return torch.rand(num_samples, num_classes).softmax(-1)


def test_float64_stays_float64() -> None:
    features = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randint(3, (8,))
    criterion = SeparateLoss(3, 4, dtype=torch.float64)
    loss = criterion(features, target)
    loss.backward()
    assert criterion.last_terms is not None
    for value in (loss, *criterion.last_terms[:2], criterion.centers, features.grad):
        assert value is not None
        assert value.dtype == torch.float64


@pytest.mark.parametrize(
    "features_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize(
    "centers_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_each_gradient_has_the_type_of_its_tensor(
    features_dtype: torch.dtype, centers_dtype: torch.dtype, kind: str
) -> None:
    features = torch.randn(8, 4).to(features_dtype).requires_grad_()
    centers = torch.randn(3, 4).to(centers_dtype).requires_grad_()
    target = target_of(kind, 8, 3)
    loss = separate_loss(features, target, centers, weight=torch.rand(3))
    loss.backward()
    assert features.grad is not None
    assert centers.grad is not None
    assert features.grad.dtype == features_dtype
    assert centers.grad.dtype == centers_dtype
    wide = torch.float64 if torch.float64 in (features_dtype, centers_dtype) else torch.float32
    assert loss.dtype == wide
    moved = F.update_centers(features, target, centers, center_lr=1.0)
    assert moved.dtype == centers_dtype


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_changes_nothing(half: torch.dtype, kind: str, backward_inside: bool) -> None:
    """Matrix products of the loss do not run in half precision, nor do those of its gradients."""
    features = torch.randn(64, 32).to(half)
    target = target_of(kind, 64, 10)
    results = []
    for enabled in (False, True):
        torch.manual_seed(1)
        criterion = SeparateLoss(10, 32, center_init="sphere")
        learned = SeparateLoss(10, 32, center_update="gradient")
        leaf = features.clone().requires_grad_()
        with torch.autocast("cpu", dtype=half, enabled=enabled):
            loss = criterion(leaf, target) + learned(leaf, target)
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        assert leaf.grad is not None
        assert leaf.grad.dtype == half
        results.append((loss, leaf.grad.float(), criterion.centers, learned.centers.grad))
    for one, other in zip(*results, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("center_update", ["forward", "gradient"])
def test_training_continues_after_the_gradient_scaler_skips_an_overflow(center_update: Any) -> None:
    model = nn.Linear(6, 4)
    criterion = SeparateLoss(3, 4, center_update=center_update)
    parameters = [*model.parameters(), *criterion.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    before = [parameter.detach().clone() for parameter in parameters]
    for step in range(6):
        images, target = torch.randn(8, 6), torch.randint(3, (8,))
        if step == 0:
            images[2] = torch.inf
        with torch.autocast("cpu", dtype=torch.float16):
            loss = criterion(model(images), target)
        assert loss.isfinite() == (step > 0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert criterion.centers.isfinite().all()
        if step == 0:
            assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert scaler.get_scale() == 2.0**15
    assert not any(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_strided_and_expanded_tensors_give_the_same_loss() -> None:
    plain = torch.randn(6, 4), torch.randint(5, (6,)), torch.randn(5, 4)
    strided = (
        torch.zeros(12, 8)[::2, ::2].copy_(plain[0]),
        plain[1].repeat(2).view(2, 6)[1],
        plain[2],
    )
    transposed = plain[0].T.contiguous().T, plain[1], plain[2].T.contiguous().T
    expected = separate_loss(*plain)
    moved = F.update_centers(*plain, center_lr=1.0)
    for other in (strided, transposed):
        assert torch.equal(other[0], plain[0])
        torch.testing.assert_close(separate_loss(*other), expected)
        torch.testing.assert_close(F.update_centers(*other, center_lr=1.0), moved)
    row = torch.randn(1, 4, requires_grad=True)
    loss = separate_loss(row.expand(6, 4), plain[1], plain[2][:1].expand(5, 4))
    loss.backward()
    assert row.grad is not None
    assert row.grad.isfinite().all()


def test_centers_move_if_features_require_no_gradient() -> None:
    """As with a frozen backbone."""
    criterion = SeparateLoss(3, 4)
    features, target = torch.randn(8, 4), torch.arange(8) % 3
    assert not criterion(features, target).requires_grad
    assert criterion.centers.norm(dim=-1).gt(0.9).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    features, target, centers = torch.randn(6, 4), torch.randint(5, (6,)), torch.randn(5, 4)
    assert torch.equal(
        separate_loss(features, target.to(dtype), centers), separate_loss(features, target, centers)
    )


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("center_update", ["forward", "gradient"])
def test_meta_and_fake_tensors_have_shapes_and_types(kind: str, center_update: Any) -> None:
    for mode, device in ((nullcontext(), "meta"), (FakeTensorMode(), "cpu")):
        with mode, torch.device(device):
            criterion = SeparateLoss(3, 4, center_update=center_update)
            features = torch.randn(8, 4, requires_grad=True)
            loss = criterion(features, target_of(kind, 8, 3))
            loss.backward()
            assert features.grad is not None
            assert (loss.shape, features.grad.shape) == ((), (8, 4))
            assert criterion.centers.device.type == device


def test_a_sample_may_have_no_batch_dimension() -> None:
    sample, centers = torch.randn(4), torch.randn(5, 4)
    for target in (torch.tensor(2), torch.rand(5).softmax(-1)):
        loss = separate_loss(sample, target, centers, reduction="none")
        assert loss.shape == ()
        torch.testing.assert_close(loss, separate_loss(sample[None], target[None], centers))
