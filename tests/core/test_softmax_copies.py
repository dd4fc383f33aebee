"""Copies, pickles and hooks: of the loss, of the model, and of both together."""

import copy
import gc
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from separate_loss import SeparateLoss, SoftmaxSeparateLoss
from tests.helpers.heads import (
    CENTERS,
    FEATURE_DIM,
    INPUT_DIM,
    NUM_CLASSES,
    TARGET,
    inputs_of,
    intra_of,
    model_and_loss,
)


class ModelWithLoss(nn.Module):
    """A model with its loss as a submodule, in either order."""

    def __init__(self, loss_first: bool = False) -> None:
        super().__init__()
        model, criterion = model_and_loss()
        if loss_first:
            self.criterion = criterion
        self.model = model
        if not loss_first:
            self.criterion = criterion

    def forward(self, inputs: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.model(inputs), target)
        return loss


def save_and_load(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "torch.save": save_and_load,
    "twice": lambda value: copy.deepcopy(pickled(value)),
    "thrice": lambda value: pickled(copy.deepcopy(copy.deepcopy(value))),
}


@pytest.mark.parametrize(
    ("way", "loss_first", "compiled"),
    [(way, loss_first, False) for way in COPIES for loss_first in (False, True)]
    + [("deepcopy", False, True), ("thrice", True, True)],
)
def test_a_copied_loss_watches_the_copied_head(way: str, loss_first: bool, compiled: bool) -> None:
    original = ModelWithLoss(loss_first)
    inputs = inputs_of()
    twin = COPIES[way](original)
    call = torch.compile(twin, backend="aot_eager") if compiled else twin
    torch.testing.assert_close(call(inputs, TARGET), original(inputs, TARGET))
    torch.testing.assert_close(twin.criterion.separate.centers, original.criterion.separate.centers)
    for mine, other in ((twin, original), (original, twin)):
        with pytest.raises(RuntimeError, match="another head has led to logits"):
            mine.criterion(other.model(inputs), TARGET)
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    for _ in range(3):
        call(inputs, TARGET).backward()
        optimizer.step()
    twin.criterion.unwatch()
    with pytest.raises(RuntimeError, match="no head is watched"):
        twin(inputs, TARGET)
    original(inputs, TARGET)


def test_a_copied_tuple_of_model_and_loss_stays_linked() -> None:
    pair = model_and_loss()
    for model, criterion in (copy.deepcopy(pair), pickled(pair)):
        assert criterion(model(inputs_of()), TARGET).isfinite()


def test_a_loss_copied_alone_watches_nothing() -> None:
    model, criterion = model_and_loss()
    for twin in (copy.deepcopy(criterion), pickled(criterion)):
        with pytest.raises(RuntimeError, match=r"copied or unpickled loss needs\s+that"):
            twin(model(inputs_of()), TARGET)
        assert torch.equal(twin.separate.centers, CENTERS)
        twin.watch(model[-1])
        # Two losses may watch one head.
        assert twin(model(inputs_of()), TARGET).isfinite()
        assert criterion(model(inputs_of()), TARGET).isfinite()
        criterion.load_state_dict({"separate.centers": CENTERS})
        twin.unwatch()


def test_a_watched_model_is_saved_without_the_loss() -> None:
    model, other = model_and_loss()
    other.unwatch()
    state = pickle.dumps(model.state_dict())
    criterion = SoftmaxSeparateLoss(model[-1])
    assert pickle.dumps(model.state_dict()) == state
    assert list(criterion.state_dict()) == ["separate.centers"]
    assert not list(criterion.parameters())
    inputs = inputs_of()
    for twin in (copy.deepcopy(model), pickled(model), copy.deepcopy(pickled(model))):
        assert torch.equal(twin(inputs), model(inputs))
        criterion(model(inputs), TARGET)
        with pytest.raises(RuntimeError, match="no forward pass of the watched head has led"):
            criterion(twin(inputs), TARGET)  # the copy is not watched
    assert torch.export.export(model, (inputs,)).module()(inputs).shape == (6, NUM_CLASSES)
    criterion.unwatch(model[-1])
    assert b"separate_loss" not in pickle.dumps(model)


def test_hooks_are_removed_with_the_loss() -> None:
    model, criterion = model_and_loss()
    assert len(model[-1]._forward_hooks) == 1
    criterion.unwatch()
    assert not model[-1]._forward_hooks
    criterion.watch(model[-1])
    del criterion
    gc.collect()
    assert not model[-1]._forward_hooks


def test_hooks_of_a_copied_model_can_be_removed() -> None:
    """TorchScript compiles no module with a hook."""
    model, criterion = model_and_loss()
    twin = copy.deepcopy(model)
    assert twin[-1]._forward_hooks
    criterion.unwatch(twin[-1])
    criterion.unwatch()
    for module in (model, twin):
        assert not module[-1]._forward_hooks
        assert not module[-1]._forward_pre_hooks
        assert torch.jit.script(module)(torch.zeros(2, INPUT_DIM)).shape == (2, NUM_CLASSES)


def test_averaged_models_hold_the_centers_of_their_own_losses() -> None:
    """`AveragedModel` pairs buffers by position."""

    class Tasks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Dropout(0.1), nn.Linear(FEATURE_DIM, NUM_CLASSES))
            self.first_loss = SoftmaxSeparateLoss(self.first)
            self.norm = nn.BatchNorm1d(FEATURE_DIM, affine=False)
            self.second = nn.Sequential(nn.Dropout(0.1), nn.Linear(FEATURE_DIM, NUM_CLASSES))
            self.second_loss = SoftmaxSeparateLoss(self.second)

    model = Tasks()
    average: Any = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.0), use_buffers=True
    )
    features = torch.randn(6, FEATURE_DIM, requires_grad=True)
    for _ in range(3):
        normed = model.norm(features)
        target = torch.randint(NUM_CLASSES, (6,))
        loss = model.first_loss(model.first(normed), target)
        loss = loss + model.second_loss(model.second(normed), target.flip(0))
        loss.backward()
        average.update_parameters(model)
    averaged = average.module.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(averaged[name], value, msg=name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min:UserWarning")
def test_quantization_aware_preparation_keeps_the_head_watched() -> None:
    """It moves hooks to another module, and calls them with fewer arguments."""
    from torch.ao import quantization  # noqa: PLC0415

    model, _ = model_and_loss()
    model = nn.Sequential(quantization.QuantStub(), *model, quantization.DeQuantStub()).train()
    criterion = SoftmaxSeparateLoss(model[2], center_init=CENTERS)
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    quantization.prepare_qat(model, inplace=True)
    features: list[Tensor] = []
    model[2].register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    criterion(model(inputs_of()), TARGET).backward()
    assert criterion.last_terms is not None
    torch.testing.assert_close(criterion.last_terms.intra, intra_of(features[0], TARGET))
    criterion.unwatch()
    model(inputs_of())


def test_copies_share_the_process_group_and_pickles_are_refused(tmp_path: Path) -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        pair = model_and_loss(process_group=group)
        twin, twin_loss = copy.deepcopy(pair)
        assert twin_loss.separate.process_group is group
        assert twin_loss(twin(inputs_of()), TARGET).isfinite()
        with pytest.raises(
            TypeError, match=r"ProcessGroup.*cannot be pickled; save the state_dict"
        ):
            pickle.dumps(pair[1])
        assert isinstance(copy.deepcopy(SeparateLoss(3, 2, process_group=group)), SeparateLoss)
    finally:
        dist.destroy_process_group()


def test_a_loss_that_watches_again_watches_once() -> None:
    model, criterion = model_and_loss()
    for _ in range(3):
        criterion.watch(model[-1])
    (head,) = criterion._heads
    assert head.losses == (id(criterion),)
    criterion.unwatch(model[-1])
    assert not model[-1]._forward_hooks
