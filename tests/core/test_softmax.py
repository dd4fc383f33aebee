"""The joint loss equals a hand-written training loop; sizes, options, errors and checkpoints."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from separate_loss import SeparateLoss, SoftmaxSeparateLoss, separate_loss
from tests.helpers.heads import (
    CENTERS,
    FEATURE_DIM,
    NUM_CLASSES,
    TARGET,
    inputs_of,
    model_and_loss,
)
from tests.helpers.models import Attention, Residual


def run_with_features(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features and logits of a model, by a forward hook."""
    features: list[Tensor] = []
    handle = model.head.register_forward_hook(lambda _, inputs, __: features.append(inputs[0]))
    logits = model(images)
    handle.remove()
    return features[0], logits


@pytest.mark.parametrize("model_class", [Residual, Attention])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["indices", "ignoring", "smooth", "probabilities"])
def test_loss_gradients_and_centers_are_those_of_a_hand_written_loop(
    model_class: Callable[[], Any], kind: str, reduction: Any
) -> None:
    model = model_class().double()
    num_classes, feature_dim = model.head.weight.shape
    images, target = torch.randn(6, 3, 8, 8).double(), torch.arange(6) % num_classes
    smoothing, soft = 0.0, target
    if kind == "ignoring":
        target[2] = -100
    elif kind == "probabilities":
        target = soft = torch.rand(6, num_classes).double().softmax(-1)
    elif kind == "smooth":
        smoothing = 0.1
        soft = F.one_hot(target, num_classes).double() * 0.9 + 0.1 / num_classes
    weight = torch.rand(num_classes, dtype=torch.float64)
    centers = torch.randn(num_classes, feature_dim, dtype=torch.float64)

    features, logits = run_with_features(model, images)
    softmax = F.cross_entropy(
        logits, target, weight=weight, label_smoothing=smoothing, reduction=reduction
    )
    separate = separate_loss(features, soft, centers, weight=weight, reduction=reduction)
    expected = softmax + separate
    expected_grads = torch.autograd.grad(expected.sum(), list(model.parameters()))

    criterion = SoftmaxSeparateLoss(
        model.head,
        center_init=centers,
        label_smoothing=smoothing,
        weight=weight,
        reduction=reduction,
        dtype=torch.float64,
    )
    loss = criterion(model(images), target)
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(loss.sum(), list(model.parameters()))
    torch.testing.assert_close(grads, expected_grads)

    other = SeparateLoss(*centers.shape, center_init=centers, dtype=torch.float64)
    other(features, target)
    torch.testing.assert_close(criterion.separate.centers, other.centers)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_last_terms_hold_detached_means(reduction: Any) -> None:
    model, criterion = model_and_loss(reduction=reduction)
    assert criterion.last_terms is None
    loss = criterion(model(inputs_of()), TARGET)
    terms = criterion.last_terms
    assert terms is not None
    assert not any(term.requires_grad for term in terms)
    if reduction != "sum":
        total = terms.softmax + terms.intra + terms.inter
        torch.testing.assert_close(total, loss.detach().mean())


def test_ignored_tokens_of_sequences_have_no_gradient() -> None:
    head = nn.Sequential(nn.Identity(), nn.Linear(FEATURE_DIM, NUM_CLASSES))
    criterion = SoftmaxSeparateLoss(head)
    target = torch.randint(NUM_CLASSES, (4, 7))
    target[0, 3:] = -100
    tokens = torch.randn(4, 7, FEATURE_DIM, requires_grad=True)
    criterion(head(tokens), target).backward()
    assert tokens.grad is not None
    assert not tokens.grad[0, 3:].any()
    criterion.eval()
    torch.testing.assert_close(
        criterion(head(tokens).view(-1, NUM_CLASSES), target.view(-1)),
        criterion(head(tokens), target),
    )


class ByName(nn.Module):
    """A head that takes its features by name, with the sizes in a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Identity(), nn.Linear(16, 5))

    def forward(self, *, features: Tensor) -> Tensor:
        logits: Tensor = self.layers(features)
        return logits


class WithoutSizes(nn.Module):
    """A head without a layer that has sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 16))

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight)


@pytest.mark.parametrize(
    "head",
    [
        nn.Linear(16, 5),
        nn.Sequential(nn.Dropout(), nn.Linear(16, 5)),
        nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5)),
        nn.Conv2d(16, 5, 1),
        nn.Sequential(nn.BatchNorm1d(16), ByName()),
    ],
)
def test_sizes_come_from_the_layers_of_the_head(head: nn.Module) -> None:
    assert SoftmaxSeparateLoss(head).separate.centers.shape == (5, 16)


@pytest.mark.parametrize("center_update", ["forward", "gradient", "none"])
def test_heads_without_sizes_need_them_as_arguments(center_update: Any) -> None:
    """Optimizers, averaged models and `to` would miss centers that are created later."""
    for head, missing in ((WithoutSizes(), "num_classes"), (nn.LazyLinear(5), "feature_dim")):
        with pytest.raises(ValueError, match=f"{missing} must be given"):
            SoftmaxSeparateLoss(head, center_update=center_update)
        criterion = SoftmaxSeparateLoss(head, num_classes=5, feature_dim=16)
        features = torch.randn(6, 16, requires_grad=True)
        assert criterion(head(features), TARGET).isfinite()


def test_a_type_or_device_set_before_the_first_batch_is_kept() -> None:
    head = nn.Sequential(nn.Dropout(0.1), nn.Linear(FEATURE_DIM, NUM_CLASSES)).double()
    criterion = SoftmaxSeparateLoss(head).double()
    features = torch.randn(6, FEATURE_DIM, dtype=torch.float64, requires_grad=True)
    criterion(head(features), TARGET)
    assert criterion.separate.centers.dtype == torch.float64
    assert criterion.to("meta").separate.centers.is_meta


def test_training_resumes_bit_identically() -> None:
    def start() -> list[Any]:
        torch.manual_seed(1)
        model, criterion = model_and_loss(center_init=None, label_smoothing=0.1)
        return [model, criterion, torch.optim.AdamW(model.parameters())]

    def train(seed: int, model: Any, criterion: Any, optimizer: Any) -> list[float]:
        torch.manual_seed(seed)
        losses = []
        for _ in range(10):
            loss = criterion(model(inputs_of()), TARGET)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    first, second = start(), start()
    train(2, *first)
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in first], buffer)
    buffer.seek(0)
    for part, state in zip(second, torch.load(buffer, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert train(3, *first) == train(3, *second)
    assert torch.equal(first[1].separate.centers, second[1].separate.centers)


@pytest.mark.parametrize("saved_as", ["forward", "gradient", "none"])
@pytest.mark.parametrize("loaded_as", ["forward", "gradient", "none"])
def test_checkpoints_load_in_every_mode(saved_as: Any, loaded_as: Any) -> None:
    _, saved = model_and_loss(center_update=saved_as)
    _, loaded = model_and_loss(center_update=loaded_as, center_init="sphere")
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(saved.separate.centers, loaded.separate.centers)
    other = SoftmaxSeparateLoss(nn.Linear(FEATURE_DIM, NUM_CLASSES + 1))
    with pytest.raises(RuntimeError, match=r"size mismatch for separate.centers"):
        other.load_state_dict(saved.state_dict())


@pytest.mark.parametrize(
    ("logits_shape", "target", "error", "message"),
    [
        ((6, 3), TARGET, RuntimeError, r"^operator 'slice'"),
        ((3, 4), TARGET[:3], RuntimeError, r"(?s)^operator 'slice'.*labels to ignore_index"),
        ((6, 4), TARGET[:, None], ValueError, r"target of class indices must have shape \(6,\)"),
        ((6, 4), TARGET + 1, IndexError, r"target must hold class indices in \[0, 4\).* got 4"),
        ((6, 4), TARGET.bool(), TypeError, "target must hold class indices"),
    ],
)
def test_bad_calls_are_refused(logits_shape: Any, target: Tensor, error: Any, message: str) -> None:
    model, criterion = model_and_loss()
    num_samples, num_classes = logits_shape
    logits = model(inputs_of())
    if logits.shape != logits_shape:
        logits = logits[:num_samples, :num_classes]
    with pytest.raises(error, match=message):
        criterion(logits, target)
    assert torch.equal(criterion.separate.centers, CENTERS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"head": "fc"}, TypeError, "head must be a torch.nn.Module, got str"),
        ({"num_classes": 4}, ValueError, "num_classes must be 5, as in the head, or None"),
        ({"feature_dim": 4}, ValueError, "feature_dim must be 16, as in the head, or None"),
        ({"head": ByName(), "reduction": "some"}, ValueError, "reduction must be one of"),
        ({"head": ByName(), "center_lr": -1.0}, ValueError, "center_lr must be finite"),
        ({"separate_weight": -1.0}, ValueError, "separate_weight must be finite and not negative"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"head": nn.Linear(16, 1)}, ValueError, "num_classes must be at least 2"),
        ({"class_dim": 0}, ValueError, "class_dim must be one of 1, -1, got 0"),
        ({"center_update": "sgd"}, ValueError, "center_update must be one of"),
        ({"weight": [1.0] * 5}, TypeError, "weight must be a tensor, got list"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: Any, message: str) -> None:
    head = nn.Linear(16, 5)
    with pytest.raises(error, match=message):
        SoftmaxSeparateLoss(**({"head": head} | options))
    assert not head._forward_hooks
