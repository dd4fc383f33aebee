"""When a call of the loss moves the centers, and what it keeps in memory."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from separate_loss import SoftmaxSeparateLoss
from separate_loss._features import find
from tests.helpers.heads import (
    CENTERS,
    FEATURE_DIM,
    NUM_CLASSES,
    TARGET,
    in_mode,
    inputs_of,
    model_and_loss,
)


@pytest.mark.parametrize("mode", ["graph", "compiled"])
def test_centers_move_only_while_the_head_is_in_training(mode: str) -> None:
    """Without `no_grad`, validation or an adversarial attack must not move centers either."""
    model, criterion = model_and_loss()
    call, _ = in_mode(mode, model)
    inputs = inputs_of()
    model.eval()
    with pytest.warns(UserWarning, match=r"evaluation mode .* head.train\(\)"):
        criterion(call(inputs), TARGET).backward()
    criterion(call(inputs), TARGET).backward()  # warns once only
    assert torch.equal(criterion.separate.centers, CENTERS)
    model[-1].train()
    criterion(call(inputs), TARGET)
    assert not torch.equal(criterion.separate.centers, CENTERS)


@pytest.mark.parametrize("without", ["gradients", "gradients of the model", "training"])
def test_centers_do_not_move_in_evaluation(without: str) -> None:
    model, criterion = model_and_loss()
    criterion.train(without != "training")
    with torch.set_grad_enabled(without == "training"):
        logits = model(inputs_of())
    with torch.set_grad_enabled(without != "gradients"):
        criterion(logits, TARGET)
    assert torch.equal(criterion.separate.centers, CENTERS)


def test_modes_may_be_restored_module_by_module() -> None:
    """As Lightning does after its check of validation data."""
    head = nn.Sequential(nn.Dropout(0.1), nn.Linear(FEATURE_DIM, NUM_CLASSES))
    criterion = SoftmaxSeparateLoss(head)
    model = nn.ModuleDict({"head": head, "criterion": criterion})
    features = torch.randn(6, FEATURE_DIM, requires_grad=True)
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    with torch.inference_mode():
        criterion(head(features), TARGET)
    for name, module in model.named_modules():
        module.training = modes[name]
    criterion(head(features), TARGET)
    assert criterion.separate.centers.any()


def test_features_without_a_gradient_cause_one_warning() -> None:
    whole, _ = model_and_loss()
    frozen, _ = model_and_loss()
    frozen[0].requires_grad_(False)
    for head, model in ((whole, whole), (frozen[-1], frozen)):
        criterion = SoftmaxSeparateLoss(head)
        with pytest.warns(UserWarning, match=r"are frozen.*is the whole model"):
            criterion(model(inputs_of()), TARGET).backward()
        criterion(model(inputs_of()), TARGET).backward()


def test_a_frozen_backbone_works_under_autocast_with_small_integers() -> None:
    model, _ = model_and_loss()
    model[0].requires_grad_(False)
    criterion = SoftmaxSeparateLoss(model[-1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(inputs_of())
        with pytest.warns(UserWarning, match="the features require no gradient"):
            loss = criterion(logits, TARGET.int())
    loss.backward()
    assert loss.dtype == torch.float32
    assert model[-1].weight.grad is not None
    assert criterion.separate.centers.dtype == torch.float32
    assert criterion.separate.centers.norm(dim=-1).gt(0.9).all()


def features_of(head: Any) -> list["weakref.ref[Tensor]"]:
    """Collects weak references to the inputs of a head."""
    seen: list[weakref.ref[Tensor]] = []
    head.register_forward_pre_hook(lambda _, inputs: seen.append(weakref.ref(inputs[0])))
    return seen


def freed(features: list["weakref.ref[Tensor]"]) -> list[bool]:
    return [reference() is None for reference in features]


def test_features_are_freed_with_the_loss() -> None:
    """By reference counts alone."""
    model, criterion = model_and_loss()
    features = features_of(model[-1])
    for _ in range(5):
        criterion(model(inputs_of()), TARGET).backward()
        assert freed(features[-1:]) == [True]


def test_kept_outputs_keep_few_features() -> None:
    """A user may keep outputs, as for a metric at the end of an epoch."""
    model, criterion = model_and_loss()
    features = features_of(model[-1])
    with torch.no_grad():
        kept = [model(inputs_of()) for _ in range(20)]
        assert freed(features) == [True] * 12 + [False] * 8
        kept.clear()
        for _ in range(2):
            model(inputs_of())
        assert freed(features) == [True] * 20 + [False] * 2
    for _ in range(2):
        criterion(model(inputs_of()), TARGET).backward()
    assert all(freed(features))
    features.clear()
    for _ in range(3):
        kept.append(model(inputs_of()))
        criterion(kept[-1], TARGET).backward()
        gc.collect()
        assert all(freed(features))
    model(inputs_of())
    gc.collect()
    assert all(freed(features))


@pytest.mark.parametrize("mode", ["graph", "compiled"])
def test_recorded_features_are_freed_with_the_graph(mode: str) -> None:
    model, criterion = model_and_loss()
    call, _ = in_mode(mode, model)
    kept = []
    for _ in range(3):
        logits = call(inputs_of())
        criterion(logits, TARGET)
        features = weakref.ref(find(logits, -1, criterion._heads)[0].features)
        criterion(logits, TARGET).backward()
        kept.append(logits)
        gc.collect()
        assert features() is None


def test_memory_does_not_grow() -> None:
    """No more tensors are alive after 300 steps than after 10."""
    model, criterion = model_and_loss()
    optimizer = torch.optim.Adam(model.parameters())

    def alive_after(steps: int) -> int:
        for _ in range(steps):
            loss = criterion(model(inputs_of()), TARGET)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        del loss
        gc.collect()
        return sum(issubclass(type(value), Tensor) for value in gc.get_objects())

    few = alive_after(10)
    assert alive_after(300) <= few
