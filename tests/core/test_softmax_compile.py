"""torch.compile with the joint loss: of the model, of the loss, of both in one graph."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from separate_loss import SoftmaxSeparateLoss, _features, _watch
from tests.helpers.heads import (
    CENTERS,
    FEATURE_DIM,
    NUM_CLASSES,
    TARGET,
    inputs_of,
    model_and_loss,
)
from tests.helpers.models import Attention, Residual
from tests.helpers.releases import COMPILES_UPDATES


def train(
    model: Any, criterion: SoftmaxSeparateLoss, step: Any, batches: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Losses, and the centers at the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for batch in batches:
        loss = step(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), criterion.separate.centers


@pytest.mark.parametrize("model_class", [Residual, Attention])
def test_compiled_models_train_as_uncompiled_ones(model_class: Any) -> None:
    model = model_class()
    batches = [(torch.randn(6, 3, 8, 8), torch.arange(6) % model.head.out_features)] * 10
    results = []
    for compiled in (False, True):
        twin = copy.deepcopy(model)
        criterion = SoftmaxSeparateLoss(twin.head)
        call = torch.compile(twin, fullgraph=True) if compiled else twin
        step = lambda images, target, call=call, criterion=criterion: criterion(  # noqa: E731
            call(images), target
        )
        results.append(train(twin, criterion, step, batches))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_model_and_loss_compile_to_one_graph_for_all_batch_sizes() -> None:
    model = nn.Sequential(nn.Linear(5, FEATURE_DIM), nn.Linear(FEATURE_DIM, NUM_CLASSES))
    sizes = [6 + number % 3 for number in range(12)]
    batches = [(inputs_of(size), torch.arange(size) % NUM_CLASSES) for size in sizes]
    results = []
    for compiled in (False, True):
        twin = copy.deepcopy(model)
        criterion = SoftmaxSeparateLoss(twin[-1])

        def step(
            inputs: Tensor, target: Tensor, model: Any = twin, criterion: Any = criterion
        ) -> Any:
            return criterion(model(inputs), target)

        call = (
            torch.compile(step, fullgraph=COMPILES_UPDATES, backend="aot_eager")
            if compiled
            else step
        )
        results.append(train(twin, criterion, call, batches))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_two_passes_and_two_losses_compile_to_one_graph() -> None:
    model, criterion = model_and_loss(center_update="none")

    def both(*batches: Tensor) -> list[Tensor]:
        outputs = [model(batch) for batch in batches]
        return [criterion(output, TARGET) for output in outputs]

    batches = inputs_of(2, 6).unbind()
    expected = [criterion(model(batch), TARGET) for batch in batches]
    call: Any = torch.compile(both, fullgraph=COMPILES_UPDATES, backend="aot_eager")
    torch.testing.assert_close(call(*batches), expected)


def test_a_subclass_may_call_the_compiled_loss_of_its_parent() -> None:
    """Where a release runs the loss uncompiled, that is the parent's part alone."""

    class Doubled(SoftmaxSeparateLoss):
        def forward(self, *arguments: Any, **named: Any) -> Tensor:
            return 2 * super().forward(*arguments, **named)

    model, criterion = model_and_loss()
    doubled = Doubled(model[-1], center_init=CENTERS)
    inputs = inputs_of()
    step = torch.compile(lambda inputs: doubled(model(inputs), TARGET), backend="aot_eager")
    torch.testing.assert_close(step(inputs), 2 * criterion(model(inputs), TARGET))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_logits_may_be_cast_in_compiled_code(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where keeping the values of an output with a graph would wait for the device."""

    def note(noted: _watch.ForwardPass, output: Tensor) -> None:
        noted.values = None
        _watch.note(noted, output)

    if device == "cuda":
        monkeypatch.setattr(_features, "note", note)
    model, criterion = model_and_loss(center_update="none")

    def cast(inputs: Tensor) -> Tensor:
        logits: Tensor = model(inputs).double()
        return logits

    compiled, inputs = torch.compile(cast, backend="aot_eager"), inputs_of()
    expected = criterion(cast(inputs), TARGET)
    torch.testing.assert_close(criterion(compiled(inputs), TARGET), expected)


def test_an_export_of_the_loss_is_refused() -> None:
    """Without Dynamo, where code that runs uncompiled is still taken for compiled.

    Torch 2.6 cannot tell an export, so that the loss compares values, which an export refuses.
    """

    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.criterion = model_and_loss()

        def forward(self, inputs: Tensor) -> Any:
            return self.criterion(self.model(inputs), TARGET)

    with pytest.raises(RuntimeError, match=r"no forward pass of the watched|allclose"):
        torch.export.export(Trained(), (inputs_of(),), strict=False)


def test_a_compiled_loss_can_be_pickled() -> None:
    model, criterion = model_and_loss()
    criterion.compile(backend="aot_eager")
    criterion(model(inputs_of()), TARGET)
    twin = pickle.loads(pickle.dumps(criterion))
    assert torch.equal(twin.separate.centers, criterion.separate.centers)
