"""A ready loss inside of the joint loss, and the options of a new one."""

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from separate_loss import SeparateLoss, SoftmaxSeparateLoss
from separate_loss._modules import SeparateOptions
from tests.helpers.heads import (
    CENTERS,
    FEATURE_DIM,
    NUM_CLASSES,
    TARGET,
    inputs_of,
    model_and_loss,
)
from tests.helpers.releases import COMPILES_UPDATES


class Doubled(SeparateLoss):
    """A loss of one's own."""

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(features, target)


class Squares(nn.Module):
    """The least that the joint loss asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout().eval()
        self.modes: list[bool] = []

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        assert features.shape == (target.numel(), FEATURE_DIM)
        self.modes.append(self.training)
        return features.square().mean()


def test_a_ready_loss_is_called_as_a_module() -> None:
    model, expected = model_and_loss()
    calls: list[str] = []
    losses = [Doubled(NUM_CLASSES, FEATURE_DIM, center_init=CENTERS) for _ in range(2)]
    for loss in losses:
        loss.register_forward_hook(lambda *_: calls.append("hook"))
    given = SoftmaxSeparateLoss(model[-1], separate=losses[0], separate_weight=0.5)
    assigned = SoftmaxSeparateLoss(model[-1], separate_weight=0.5)
    assigned.separate = losses[1]
    expected.separate_weight = 1.0
    logits = model(inputs_of())
    for criterion in (given, assigned):
        torch.testing.assert_close(criterion(logits, TARGET), expected(logits, TARGET))
        expected.load_state_dict({"separate.centers": CENTERS})
        expected._heads[0].latest.clear()
        logits = model(inputs_of())
    assert calls == ["hook"] * 2
    assert given.separate is losses[0]
    assert "separate.centers" in given.state_dict()


@pytest.mark.parametrize("compiled", [False, True])
def test_any_module_is_in_training_mode_exactly_when_centers_may_move(compiled: bool) -> None:
    model, _ = model_and_loss()
    separate = Squares()
    criterion = SoftmaxSeparateLoss(model[-1], separate=separate, separate_weight=0.5)
    features = model[0](inputs_of())
    logits = model[1](features)
    expected = F.cross_entropy(logits, TARGET) + 0.5 * features.square().mean()
    torch.testing.assert_close(criterion(logits, TARGET), expected)
    criterion(logits, TARGET)  # the same pass again
    assert criterion.last_terms is None

    def step(inputs: Tensor) -> Tensor:
        loss: Tensor = criterion(model(inputs), TARGET)
        return loss

    call: Any = step
    if compiled:
        call = torch.compile(step, fullgraph=COMPILES_UPDATES, backend="aot_eager")
    call(inputs_of())
    with torch.no_grad():
        call(inputs_of())
    model.eval()
    if compiled:
        call(inputs_of())
    else:
        with torch.no_grad():
            criterion(logits.detach(), TARGET)
    model.train()
    criterion.eval()
    call(inputs_of())
    assert separate.modes == [True, False, True, False, False, False]
    criterion.separate.train()
    separate.dropout.eval()
    with torch.no_grad():
        call(inputs_of())
    assert separate.training
    assert not separate.dropout.training


def test_no_error_leaves_a_changed_loss_behind() -> None:
    model, criterion = model_and_loss()
    model[0].requires_grad_(False)
    squares = Squares()
    given = SoftmaxSeparateLoss(model[-1], separate=squares)
    with pytest.raises(IndexError, match=rf"target must hold .* \[0, {NUM_CLASSES}\) .* got 9"):
        given(model(inputs_of()), TARGET + 9)
    assert squares.modes == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="require no gradient"):
            criterion(model(inputs_of()), TARGET)
    assert torch.equal(criterion.separate.centers, CENTERS)


def test_modes_are_restored_after_an_error() -> None:
    class Failing(nn.Module):
        def forward(self, features: Tensor, target: Tensor) -> Tensor:
            raise KeyError((features, target))

    model, _ = model_and_loss()
    criterion = SoftmaxSeparateLoss(model[-1], separate=Failing())
    with torch.no_grad(), pytest.raises(KeyError):
        criterion(model(inputs_of()), TARGET)
    assert criterion.separate.training


def test_the_softmax_loss_takes_the_attributes_of_a_ready_loss() -> None:
    model, _ = model_and_loss()
    separate = Squares()
    separate.weight = torch.rand(NUM_CLASSES)
    separate.ignore_index, separate.reduction, separate.label_smoothing = 2, "sum", 0.2  # type: ignore[assignment]
    criterion = SoftmaxSeparateLoss(model[-1], separate=separate, separate_weight=0.0)
    logits = model(inputs_of())
    expected = F.cross_entropy(
        logits, TARGET, separate.weight, ignore_index=2, reduction="sum", label_smoothing=0.2
    )
    torch.testing.assert_close(criterion(logits, TARGET), expected)
    ready = SeparateLoss(NUM_CLASSES, FEATURE_DIM, ignore_index=3, reduction="none")
    loss = SoftmaxSeparateLoss(model[-1], separate=ready)(model(inputs_of()), TARGET)
    assert loss.shape == TARGET.shape
    assert (loss == 0).tolist() == (TARGET == 3).tolist()


def test_sizes_of_a_ready_loss_are_those_of_the_head() -> None:
    head = nn.Linear(FEATURE_DIM, NUM_CLASSES)
    for sizes, name in (((5, FEATURE_DIM), "num_classes"), ((NUM_CLASSES, 5), "feature_dim")):
        with pytest.raises(ValueError, match=f"separate.{name} must be . as in the head|, got 5"):
            SoftmaxSeparateLoss(head, separate=SeparateLoss(*sizes))
    unknown = nn.Sequential(nn.Identity())
    criterion = SoftmaxSeparateLoss(unknown, separate=SeparateLoss(NUM_CLASSES, FEATURE_DIM))
    assert (criterion.num_classes, criterion.feature_dim) == (NUM_CLASSES, FEATURE_DIM)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"center_rate": 1.0}, TypeError, "center_rate"),
        ({"separate": "loss"}, TypeError, "separate must be a torch.nn.Module, got str"),
        (
            {"separate": Squares(), "center_lr": 1.0, "label_smoothing": 0.1},
            TypeError,
            "separate is a ready loss, so center_lr, label_smoothing must be given to it instead",
        ),
    ],
)
def test_wrong_options_are_refused_by_name(
    options: dict[str, Any], error: Any, message: str
) -> None:
    head = nn.Linear(FEATURE_DIM, NUM_CLASSES)
    with pytest.raises(error, match=message):
        SoftmaxSeparateLoss(head, **options)
    assert not head._forward_hooks


def test_the_options_are_those_of_the_separate_loss() -> None:
    names = [*inspect.signature(SeparateLoss).parameters]
    own = {"num_classes", "feature_dim"}
    assert set(SeparateOptions.__annotations__) == set(names) - own
    head = nn.Linear(FEATURE_DIM, NUM_CLASSES, device="meta")
    assert SoftmaxSeparateLoss(head).separate.centers.is_meta
    assert SoftmaxSeparateLoss(head, device="cpu").separate.centers.is_cpu


def test_a_copied_pair_with_a_ready_loss_stays_linked() -> None:
    model, _ = model_and_loss()
    criterion = SoftmaxSeparateLoss(model[-1], separate=Squares())
    twin, twin_criterion = copy.deepcopy((model, criterion))
    twin_criterion(twin(inputs_of()), TARGET)
    assert twin_criterion.separate is not criterion.separate
